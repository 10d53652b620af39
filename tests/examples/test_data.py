# SPDX-License-Identifier: Apache-2.0
"""The demo's reading of Orange's .tab files and its choice of texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.finetuning import data
from examples.finetuning.settings import DemoError, Settings

HEADER = "Category\tText\nd\tstring\nclass\t\n"


def tab(folder: Path, body: str, header: str = HEADER, name: str = "texts.tab") -> Path:
    path = folder / name
    path.write_text(header + body, encoding="utf-8")
    return path


def settings(train: Path, test: Path, **changes: object) -> Settings:
    return Settings(model="", train_file=str(train), test_file=str(test), **changes)  # type: ignore[arg-type]


def test_reads_class_and_text(tmp_path: Path) -> None:
    path = tab(tmp_path, "earn\tnet profit rose\nship\tport of rotterdam\n\n")
    assert data.read_tab(path) == [("earn", "net profit rose"), ("ship", "port of rotterdam")]


def test_finds_the_columns_by_role_and_type(tmp_path: Path) -> None:
    header = "Year\tText\tTopic\nc\tstring\td\n\tinclude=True\tclass\n"
    assert data.read_tab(tab(tmp_path, "1987\tcrude oil\tcrude\n", header)) == [("crude", "crude oil")]


@pytest.mark.parametrize(
    "header, body, message",
    [
        (HEADER, "earn\ttext\textra\n", "line 4: 3 columns, expected 2"),
        (HEADER, "", "holds no texts"),
        ("Category\tText\n", "", "first three lines"),
        ("Category\tText\nd\tstring\n\t\n", "earn\ttext\n", "role 'class'"),
        ("Category\tText\nd\td\nclass\t\n", "earn\ttext\n", "type 'string'"),
    ],
    ids=["extra column", "no rows", "short", "no class", "no text"],
)
def test_a_bad_file_is_named(tmp_path: Path, header: str, body: str, message: str) -> None:
    path = tab(tmp_path, body, header)
    with pytest.raises(DemoError, match=message) as raised:
        data.read_tab(path)
    assert str(path) in str(raised.value)


def test_corpus_is_decided_by_the_seed(tmp_path: Path) -> None:
    train = tab(tmp_path, "".join(f"{'ab'[i % 2]}\ttext {i}\n" for i in range(40)), name="train.tab")
    test = tab(tmp_path, "".join(f"a\ttest {i}\n" for i in range(9)) + "b\tlast\n", name="test.tab")
    asked = settings(train, test, steps=3, batch_size=4, eval_texts=10)
    corpus = data.load_corpus(asked)
    assert corpus == data.load_corpus(asked)
    assert corpus != data.load_corpus(settings(train, test, steps=3, batch_size=4, eval_texts=10, seed=1))
    assert corpus.classes == ["a", "b"]
    assert (len(corpus.train), len(corpus.evaluation)) == (12, 10)
    assert corpus.majority_share == 0.9
    assert [len(batch) for batch in data.batches(corpus.evaluation, 4)] == [4, 4, 2]


def test_more_steps_than_texts_start_again(tmp_path: Path) -> None:
    train = tab(tmp_path, "a\tone\nb\ttwo\n")
    corpus = data.load_corpus(settings(train, train, steps=5, batch_size=1))
    assert corpus.train.texts == (corpus.train.texts[:2] * 3)[:5]


def test_held_out_texts_are_never_trained_on(tmp_path: Path) -> None:
    train = tab(tmp_path, "".join(f"a\ttext {i}\n" for i in range(20)), name="train.tab")
    test = tab(tmp_path, "a\ttest\n", name="test.tab")
    corpus = data.load_corpus(settings(train, test, steps=8, batch_size=4, eval_texts=6, held_out=True))
    assert len(corpus.evaluation) == 6
    assert not set(corpus.evaluation.texts) & (set(corpus.train.texts) | {"test"})
    with pytest.raises(DemoError, match="--eval-texts 18"):
        data.load_corpus(settings(train, test, steps=1, batch_size=4, eval_texts=18, held_out=True))


def test_a_class_only_in_the_test_file_is_named(tmp_path: Path) -> None:
    train, test = tab(tmp_path, "a\tone\n", name="train.tab"), tab(tmp_path, "grain\ttwo\n", name="test.tab")
    with pytest.raises(DemoError, match="grain"):
        data.load_corpus(settings(train, test))


def test_a_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(DemoError, match="install it with: pip install nowhere") as raised:
        data.package_file("frodkernels-no-such-package", "/x.tab", "pip install nowhere", "--train-file")
    assert "--train-file" in str(raised.value)


def test_missing_paths_name_their_flag(tmp_path: Path) -> None:
    here = tab(tmp_path, "a\tone\n")
    with pytest.raises(DemoError, match="--model"):
        data.find_model(str(tmp_path))
    with pytest.raises(DemoError, match="--train-file"):
        data.find_texts(str(tmp_path / "none.tab"), str(here))
    with pytest.raises(DemoError, match="--test-file"):
        data.find_texts(str(here), str(tmp_path / "none.tab"))
