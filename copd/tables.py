"""Tables of rows: JSONL, or what `datasets` loads; which rows are held out, and when a table is another one."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from copd import rewards
from copd.rows import MEDIA_COLUMNS
from copd.schema import digest
from copd.settings import DataConfig

Rows = Sequence[dict[str, Any]]
TABLES = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


def unseen(train: Rows, kept: Sequence[int], test: Rows, held_out: Sequence[int]) -> Sequence[int]:
    """Those of `kept` that equal no held-out row. Media are decoded only where everything else is equal."""

    def texts(table: Any) -> Rows:
        if isinstance(table, list):
            return [{name: value for name, value in row.items() if name not in MEDIA_COLUMNS} for row in table]
        return table.remove_columns([name for name in MEDIA_COLUMNS if name in table.column_names])

    def key(row: dict[str, Any]) -> str:
        return json.dumps(row, sort_keys=True, default=_plain)

    train_texts, test_texts = texts(train), texts(test)
    alike: dict[str, list[int]] = {}
    for i in held_out:
        alike.setdefault(key(test_texts[i]), []).append(i)
    twins = {i: alike[text] for i in kept if (text := key(train_texts[i])) in alike}
    equal = {i for i, others in twins.items() if key(train[i]) in {key(test[j]) for j in others}}
    return [i for i in kept if i not in equal] if equal else kept


def read(path: str, split: str, config_name: str | None) -> Sequence[dict[str, Any]]:
    """Rows of a JSONL file, of another table, or of a folder or name that `datasets` loads."""
    file = Path(path)
    if file.suffix != ".jsonl":
        import datasets

        if (file / "state.json").is_file() or (file / "dataset_dict.json").is_file():  # written by save_to_disk
            loaded = datasets.load_from_disk(path)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if kind := TABLES.get(file.suffix) if file.is_file() else None:
            table = datasets.load_dataset(kind, data_files={split: path}, split=split)
            return table if set(MEDIA_COLUMNS) & set(table.column_names) else table.to_list()
        return datasets.load_dataset(path, config_name, split=split)
    if not file.is_file():
        raise ValueError(f"data: path must be a JSONL file, a folder or a dataset; got {path!r}, which does not exist")
    rows = []
    # U+2028 and its like are letters of a JSON string: newlines alone end a line
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"data: line {number} of {path} must be JSON; got {error}") from error
                if not isinstance(rows[-1], dict):
                    got = type(rows[-1]).__name__
                    raise ValueError(f"data: line {number} of {path} must be an object; got a {got}")
    return rows


def fingerprint(cfg: DataConfig) -> dict[str, str]:
    """Digests of what a config names and does not hold: the rows of local files, and the code of own rewards."""
    found = {}
    for path in filter(None, (cfg.path, cfg.test_path)):
        files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
        parts = [_digest(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()]
        if parts:
            found[path] = digest(*parts)
    for name in cfg.rewards:
        if name not in rewards.BUILT_IN:
            module = inspect.getmodule(rewards.load(name))
            found[name] = digest(inspect.getsource(module)) if module else ""
    return found


@lru_cache(maxsize=4096)
def _digest(file: Path, changed: int, size: int) -> str:
    """Of a table its bytes; of a picture its name and size."""
    if file.suffix in {".jsonl", ".arrow", *TABLES}:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "blake2b").hexdigest()
    return f"{file.name} {size}"


def _plain(held: Any) -> str:
    return str((held.size, held.tobytes())) if isinstance(held, Image.Image) else repr(held)
