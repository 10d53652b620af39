// SPDX-License-Identifier: Apache-2.0
//
// One cell: which slot of which step each feature takes.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tiles.h"

namespace frodkernels::tiles {

// A feature to gather, once, and the rows of the group that it serves.
struct Item {
  uint16_t position = 0;
  uint8_t rows = 0;                        // bit n: row n has an entry
  std::array<int32_t, kRows> source = {};  // of each such entry

  int bank() const { return position & (kClasses - 1); }
};

struct Step {
  std::array<std::array<int32_t, kSlots>, kOctets> item;      // index of the item, -1: empty
  std::array<std::array<uint16_t, kClasses>, kOctets> count;  // items of each class
  std::array<uint8_t, kSlots> taken;                          // rows with an entry at slot number k

  Step();
  bool fits(int octet, int k, uint8_t rows) const { return item[octet][k] < 0 && (taken[k] & rows) == 0; }
};

// Lays out cells one after the other; keeps its scratch between them.
class Layout {
 public:
  // The steps of a cell with these items; none where there are none. Any items can be laid out: what finds no place in
  // the steps that ought to do gets further ones.
  const std::vector<Step>& run(const std::vector<Item>& items);

 private:
  void share_out();
  bool has_room(int64_t octet, int32_t index) const;
  void deal(int64_t octet, int32_t index, std::size_t at = SIZE_MAX);
  void take_back(int64_t octet, std::size_t at);
  bool make_room(int64_t octets, int32_t index, int depth);
  void number_slots();
  void place(int step, int octet, int k, int32_t index);
  bool place_in(int step, int octet, int32_t index);
  bool exchange(Step& step, int octet, uint8_t rows, int free, int other);
  void place_anywhere(int32_t index);

  const std::vector<Item>* items_ = nullptr;
  std::vector<Step> steps_;
  std::vector<int32_t> order_, waiting_;
  std::vector<std::vector<int32_t>> octets_;      // the items of each, before they have slots
  std::vector<std::array<int32_t, kRows>> load_;  // entries of each row in each step
  int64_t extra_ = 0;                             // features of the largest class beyond one an octet
};

}  // namespace frodkernels::tiles
