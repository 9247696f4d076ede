"""Public prompt sets and tasks by name: from the Hub, local copies or own files; and the packaged ones.

Of a set that is not a task only the prompts are kept, never a response.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft_safety.data import load, read_jsonl
from peft_safety.data.rows import as_rows, kind_of, label_names
from peft_safety.errors import ConfigError, DataError, extra

Kind = Literal["harmful", "over_refusal", "utility"]
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class SetEntry:
    """Where a set is, and what is read of it.

    Attributes:
        hub, config, split: arguments of `datasets.load_dataset` ("all" joins every split). Without `hub`, a packaged
            set: `config` is its file.
        fields: the columns that are read. Those of a task end with its answer; the others, joined, are its prompt.
        license, gated: as on its card; a gated set is for accounts that have accepted its terms.
        where: "column=pattern": only rows whose column matches the regular expression as a whole.
        labels: names of the classes, in the order of their numbers.
        header: False if its CSV files have no line with names of columns.
    """

    name: str
    kind: Kind
    hub: str
    fields: str
    license: str
    split: str = "train"
    config: str | None = None
    gated: bool = False
    where: str = ""
    labels: str = ""
    header: bool = True


TABLE = (
    SetEntry("packaged", "harmful", "", "prompt", "apache-2.0", "test", "harmful_requests"),
    SetEntry("advbench", "harmful", "walledai/AdvBench", "prompt", "mit", gated=True),
    SetEntry("harmbench", "harmful", "walledai/HarmBench", "prompt", "mit", "train", "standard", gated=True),
    SetEntry("strongreject", "harmful", "walledai/StrongREJECT", "prompt", "mit", gated=True),
    SetEntry("jailbreakbench", "harmful", "JailbreakBench/JBB-Behaviors", "Goal", "mit", "harmful", "behaviors"),
    SetEntry("hex-phi", "harmful", "LLM-Tuning-Safety/HEx-PHI", "prompt", "hex-phi", "all", gated=True, header=False),
    SetEntry(
        "beavertails",
        "harmful",
        "PKU-Alignment/BeaverTails",
        "prompt",
        "cc-by-nc-4.0",
        "30k_test",
        where="is_safe=False",
    ),
    SetEntry(
        "sorry-bench",
        "harmful",
        "sorry-bench/sorry-bench-202503",
        "turns",
        "unknown",
        where="prompt_style=base",
        gated=True,
    ),
    SetEntry("maliciousinstruct", "harmful", "walledai/MaliciousInstruct", "prompt", "cc-by-sa-4.0"),
    SetEntry("packaged-contrast", "over_refusal", "", "prompt", "apache-2.0", "test", "contrast_prompts"),
    SetEntry("packaged-everyday", "over_refusal", "", "prompt", "apache-2.0", "test", "everyday_requests"),
    SetEntry(
        "xstest",
        "over_refusal",
        "natolambert/xstest-v2-copy",
        "prompt",
        "cc-by-4.0",
        "prompts",
        where="type=(?!contrast_).+",
    ),
    SetEntry(
        "or-bench-hard", "over_refusal", "bench-llm/or-bench", "prompt", "cc-by-4.0", "train", "or-bench-hard-1k"
    ),
    SetEntry("packaged-task", "utility", "", "text label", "apache-2.0", "test", "benign_task"),
    SetEntry("gsm8k", "utility", "openai/gsm8k", "question answer", "mit", "test", "main"),
    SetEntry("mmlu", "utility", "cais/mmlu", "question choices answer", "mit", "test", "all", labels="A B C D"),
    SetEntry(
        "sst2", "utility", "stanfordnlp/sst2", "sentence label", "unknown", "validation", labels="negative positive"
    ),
    SetEntry(
        "ag-news",
        "utility",
        "fancyzhx/ag_news",
        "text label",
        "unknown",
        "test",
        labels="World Sports Business Sci/Tech",
    ),
    SetEntry(
        "alpaca",
        "utility",
        "tatsu-lab/alpaca",
        "instruction input output",
        "cc-by-nc-4.0",
        where=r"output=(?s:.*\S.*)",
    ),
)
"""Checked at the sets' cards in 2026-11; `docs/guides/judges_and_sets.md` shows it."""
SETS: Mapping[str, SetEntry] = {entry.name: entry for entry in TABLE}


@dataclass(frozen=True)
class NamedSet:
    """A set as it was read and drawn.

    Attributes:
        prompts: user turns, each once unless the set is a task.
        rows: of a task, {text, label} or {prompt, response} for `evaluate(task=...)`; else empty.
        labels: of a classification, every label.
        sha256: of the prompts, and of a task of its whole rows and labels, whatever their order.
        source: where they were read.
    """

    name: str
    kind: Kind
    prompts: tuple[str, ...]
    rows: tuple[dict[str, Any], ...] = field(repr=False)
    labels: tuple[str, ...]
    sha256: str
    source: str
    license: str


def named_set(
    name_or_path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    directory: str | os.PathLike[str] | None = None,
    split: str | None = None,
    kind: Kind | None = None,
) -> NamedSet:
    """The prompts of a set, or the rows of a task.

    Args:
        name_or_path: a name in `TABLE`; a local copy of such a set, a directory of its name (`./advbench`); or an own
            .jsonl, .json, .csv or .parquet file with a column `prompt`, or a directory of such files.
        limit, seed: at most so many prompts, drawn by the seed without replacement. Default all, in their order.
        directory: of local copies: `directory/advbench` (as on the Hub, or any files with the set's columns) or
            `directory/advbench.jsonl`.
        split: another split than the table's.
        kind: what is needed; a set of the table that is another is refused. Own files are "harmful" by default; those
            of a "utility" have {prompt, response} or {text, label} rows.

    Raises:
        DataError: no such set, no access, no copy, no such split or column, a malformed or no row.
        ConfigError: `limit`, `kind`, a set of another kind, or `datasets` is not installed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}. Give at least 1, or None for all prompts.")
    if kind not in (None, *get_args(Kind)):
        raise ConfigError(f"kind={kind!r}. Choose one of {', '.join(get_args(Kind))}.")
    entry, path = _find(str(name_or_path), directory, kind or "harmful")
    if kind not in (None, entry.kind):
        fitting = ", ".join(one.name for one in TABLE if one.kind == kind)
        raise ConfigError(f"{entry.name!r} is a set of kind {entry.kind!r}, not {kind!r}. Choose one of {fitting}.")
    if path is not None:
        data, source = _local(path, entry, split), str(path)
    elif not entry.hub:
        data, source = load(str(entry.config), split or entry.split), f"packaged ({split or entry.split})"
    else:
        data = _from_hub(entry, split or entry.split)
        source = f"{entry.hub} ({', '.join(filter(None, (entry.config, split or entry.split)))})"
    if entry.config is None and not entry.hub and entry.kind == "utility":
        rows = as_rows(data, source)
        kinds = {kind_of(row) for row in rows}
        if kinds - {"pair", "label"} or len(kinds) > 1:
            forms = '{"prompt", "response"}, or all as {"text", "label"}'
            raise DataError(f"{source}: write all rows of a task as {forms}.")
    else:
        rows = _read(data, entry, source)
    if not rows:
        kept = f"; rows count where {entry.where}" if entry.where else ""
        raise DataError(f"{source} has no rows for {entry.name!r}. Check its files and its split{kept}.")
    order = list(range(len(rows)))
    if limit is not None:
        random.Random(seed).shuffle(order)
    drawn = [rows[index] for index in order[:limit]]
    prompts = [row["prompt"] if "prompt" in row else row["text"] for row in drawn]
    task = entry.kind == "utility"
    labels = _labels(rows, entry, source) if task else ()
    digest = _digest([sorted(map(_written, drawn)), labels] if task else sorted(prompts, key=str), source)
    return NamedSet(
        entry.name, entry.kind, tuple(prompts), tuple(drawn) if task else (), labels, digest, source, entry.license
    )


def _written(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str, ensure_ascii=False)


def _digest(hashed: list[Any], source: str) -> str:
    try:
        return hashlib.sha256(json.dumps(hashed, ensure_ascii=False).encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise DataError(f"{source} is no Unicode text: {error}. Write whole characters, in UTF-8.") from error


def _labels(rows: list[dict[str, Any]], entry: SetEntry, source: str) -> tuple[str, ...]:
    """Every label of a classification; of other tasks none."""
    labels = tuple(entry.labels.split() or label_names(rows))
    if len(labels) == 1:
        raise DataError(
            f"{source}: every row has the label {labels[0]!r}, so no answer is wrong. Give other rows too."
        )
    return labels


def _find(name: str, directory: str | os.PathLike[str] | None, kind: Kind) -> tuple[SetEntry, Path | None]:
    """The entry of a set, and the file or directory to read unless it is the table's own source."""
    entry = SETS.get(name.lower().replace("_", "-"))
    if entry is not None:
        if directory is None or not entry.hub:
            return entry, None
        places = [Path(directory, entry.name), *(Path(directory, entry.name + suffix) for suffix in READERS)]
        if copy := next(filter(Path.exists, places), None):
            return entry, copy
        raise DataError(f"no copy of {entry.name} in {directory}. Put it into {places[0]}/ or {places[1].name}.")
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix in READERS):
        own = SetEntry(path.stem, kind, "", "prompt", "unknown", split="test")
        return SETS.get(path.resolve().name, own) if path.is_dir() else own, path
    near = difflib.get_close_matches(name.lower(), SETS, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    known = f"Choose one of {', '.join(SETS)}, a directory, or a file ending in {', '.join(READERS)}."
    raise DataError(f"no prompt set, file or directory {name!r}.{guess} {known}")


def _datasets() -> Any:
    with extra("eval", "only the packaged sets and .jsonl files are read without the package `datasets`"):
        import datasets
    return datasets


def _options(entry: SetEntry) -> dict[str, Any]:
    return {} if entry.header else {"header": None, "names": entry.fields.split()}


def _local(path: Path, entry: SetEntry, split: str | None) -> Iterable[Any]:
    """The rows of a file, or of a split of a directory; a directory of one split is that split."""
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return read_jsonl(path)
    datasets = _datasets()
    try:
        if path.is_file():
            reader = READERS[path.suffix]
            options = _options(entry) if reader == "csv" else {}
            return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
        options = _options(entry) if any(path.rglob("*.csv")) else {}
        config = entry.config if entry.config in datasets.get_dataset_config_names(str(path)) else None
        data = datasets.load_dataset(str(path), config, **options)
    except Exception as error:  # `datasets` and its readers raise what they like
        raise DataError(f"{path} cannot be read: {str(error.__cause__ or error)[:300]}") from error
    wanted = split or entry.split
    if wanted == "all":
        return datasets.concatenate_datasets(list(data.values()))
    if wanted not in data and (split is not None or len(data) > 1):
        raise DataError(f"{path} has no split {wanted!r}. It has {', '.join(data)}.")
    return data[wanted] if wanted in data else next(iter(data.values()))


def _from_hub(entry: SetEntry, split: str) -> Iterable[Any]:
    datasets = _datasets()
    try:
        return datasets.load_dataset(entry.hub, entry.config, split=split, **_options(entry))
    except Exception as error:  # `datasets` and the Hub's client raise what they like
        raise DataError(_why(entry, error)) from error


def _why(entry: SetEntry, error: Exception) -> str:
    """What keeps a set of the Hub from being read, and the remedies."""
    name, said = f"{entry.hub} ({entry.name})", f"{error}"[:300]
    copy = f"or put a copy, as on the Hub, into DIRECTORY/{entry.name} and give directory=DIRECTORY (--set-dir)"
    if isinstance(error, ConnectionError):
        return f"{name} is not in the cache, and the Hub is out of reach (is HF_HUB_OFFLINE set?). Go online, {copy}."
    if entry.gated or "gated" in said:
        terms = f"On its page at the Hub (datasets/{entry.hub}), log in and accept its terms"
        return f"{name} is gated: {said} {terms}; set HF_TOKEN to a token of that account; {copy}."
    return f"{name} cannot be read: {said} Try again, {copy}."


def _read(data: Iterable[Any], entry: SetEntry, source: str) -> list[dict[str, Any]]:
    """{prompt} rows, each prompt once; or the rows of a task."""
    rows: dict[Any, dict[str, Any]] = {}
    fields, (column, _, pattern) = entry.fields.split(), entry.where.partition("=")
    for index, row in enumerate(data):
        missing = [name for name in (*fields, column) if name and name not in row]
        if missing:
            needed = f"{entry.name!r} is read from {', '.join(filter(None, (*fields, column)))}"
            raise DataError(f"{source}, row {index}: no {', '.join(missing)} in {sorted(row)}; {needed}.")
        if not column or re.fullmatch(pattern, str(row[column])):
            try:
                one = _row([row[name] for name in fields], entry)
            except DataError as problem:
                raise DataError(f"{source}, row {index}: {problem}") from problem
            rows.setdefault(index if entry.kind == "utility" else one["prompt"], one)
    return list(rows.values())


def _row(values: list[Any], entry: SetEntry) -> dict[str, Any]:
    first = values[0][0] if isinstance(values[0], list) and values[0] else values[0]
    parts, answer, labels = [_text(first)], values[-1], entry.labels.split()
    if entry.kind != "utility":
        return {"prompt": parts[0]}
    for value in filter(None, values[1:-1]):
        # the choices of a question
        parts.append(value if isinstance(value, str) else "\n".join(map("{}. {}".format, labels, value)))
    if labels and not isinstance(answer, str):
        if answer not in range(len(labels)):
            raise DataError(f"label {answer!r} is none of the {len(labels)}: {', '.join(labels)}.")
        answer = labels[answer]
    keys = ("text", "label") if labels or entry.fields.endswith("label") else ("prompt", "response")
    return dict(zip(keys, ("\n\n".join(parts), _text(answer)), strict=True))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{value!r} is no text, or an empty one.")
    return value
