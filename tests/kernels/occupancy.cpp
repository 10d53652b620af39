// SPDX-License-Identifier: Apache-2.0
//
// NVIDIA's own occupancy rule on a machine without a GPU. Reads lines of
//   major minor threads_per_sm shared_per_sm shared_per_block registers static_shared dynamic_shared threads
// and writes, for each, the blocks of an SM and the mask of what limits them.
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int major, minor, threads_sm, shared_sm, shared_block, registers, fixed, dynamic, threads;
  while (std::scanf("%d %d %d %d %d %d %d %d %d", &major, &minor, &threads_sm, &shared_sm, &shared_block, &registers,
                    &fixed, &dynamic, &threads) == 9) {
    cudaOccDeviceProp p;
    p.computeMajor = major;
    p.computeMinor = minor;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = threads_sm;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.sharedMemPerBlock = 49152;
    p.sharedMemPerMultiprocessor = static_cast<size_t>(shared_sm);
    p.sharedMemPerBlockOptin = static_cast<size_t>(shared_block);
    p.reservedSharedMemPerBlock = 1024;
    p.numSms = 100;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024;
    a.numRegs = registers;
    a.sharedSizeBytes = static_cast<size_t>(fixed);
    a.partitionedGCConfig = PARTITIONED_GC_OFF;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = static_cast<size_t>(shared_block - fixed);
    a.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_NONE;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_DEFAULT;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &a, &state, threads, static_cast<size_t>(dynamic));
    if (error != CUDA_OCC_SUCCESS) {
      std::printf("error %d\n", static_cast<int>(error));
    } else {
      std::printf("%d %u\n", result.activeBlocksPerMultiprocessor, result.limitingFactors);
    }
  }
}
