"""Files beside the tensors: the index's sums, side files, and config.json against the source's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from ckptq.checkpoint.beside import WEIGHT_FORMATS, tensors_in
from ckptq.checkpoint.open import CONFIG, INDEX, Checkpoint, Problems
from ckptq.errors import CkptqError
from ckptq.printable import listed
from ckptq.verify.kinds import AGAIN, finding
from ckptq.verify.report import Finding
from ckptq.verify.structure.vocabulary import TOKENIZER, check_vocabulary, unlike_parts
from ckptq.verify.subject import Subject

SERVING = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""What an engine looks for."""

FREE = (
    "quantization_config",
    "compression_config",
    "ckptq",
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "use_cache",
)
"""Fields that a conversion may change."""

WHOLE = ("rope_scaling", "rope_parameters")
"""Objects that mean something as a whole."""

HARMLESS = re.compile(
    r"_token_id$|dropout|^initializer|init_std|aux_loss|jitter|^output_|^return_dict|^max_position"
    r"|^architectures$|^pretraining_tp$|label|^gradient_|^auto_map$|^tie_word_embeddings$|^name$"
    r"|^use_bfloat16$|^chunk_size_feed_forward$|^task_specific|^problem_type$|^is_decoder$|_version$"
)
"""Fields that do not affect the computation: training, token ids, lengths. Ties are judged by what
is stored. Any other field may matter."""

SHOWN = 5
"""Parts of a tokenizer that one finding lists."""

ABSENT = object()

Configs = tuple[dict[str, Any], dict[str, Any]]
Resolved = Callable[[], Configs | None]
"""The checkpoint's and the source's config as transformers reads them, when they are needed."""


def check_files(subject: Subject, problems: Problems) -> Iterator[Finding]:
    """Checks that do not involve Linears."""
    yield from _twice(problems)
    yield from _index(subject.ckpt)
    yield from _stray_shards(subject)
    yield from check_vocabulary(subject)
    if subject.source is not None:
        yield from _side_files(subject.ckpt, subject.source)
        resolved = cache(partial(_resolved, subject.ckpt, subject.source))
        yield from _config(subject.ckpt.config, subject.source.config, "", resolved)


def _twice(problems: Problems) -> Iterator[Finding]:
    """Tensors that two files hold."""
    for problem in problems:
        file, _, what = problem.partition(": ")
        if "is also in" in what:
            name, repair = what.split("'")[1], "delete the file that this run did not write"
            wanted = "each tensor once"
            yield finding(
                "index-mismatch", name, file=Path(file), found=what, wanted=wanted, repair=repair
            )


def _index(ckpt: Checkpoint) -> Iterator[Finding]:
    file = ckpt.path / INDEX
    if not file.exists() and len(ckpt.headers) > 1:
        found, wanted = f"no index, and {len(ckpt.headers)} shards", "an index that lists them"
        yield finding(
            "index-mismatch", file=INDEX, found=found, wanted=wanted, repair="rewrite the index"
        )
    if file.exists():
        index = json.loads(file.read_bytes())
        yield from _misplaced(ckpt, index["weight_map"])
        yield from _total_size(ckpt, index.get("metadata"))


def _misplaced(ckpt: Checkpoint, weight_map: Mapping[str, str]) -> Iterator[Finding]:
    """One finding for all tensors that the index places in the wrong file."""
    held = {name: tensor.file.name for name, tensor in ckpt.tensors.items()}
    moved: dict[tuple[str | None, str | None], list[str]] = {}
    for name in held.keys() | weight_map.keys():
        places = weight_map.get(name), held.get(name)
        if places[0] != places[1]:
            moved.setdefault(places, []).append(name)
    for (said, real), names in moved.items():
        if len(names) > 1 and (real, said) in moved:
            repair = f"{said} and {real} may have been renamed: exchange their names"
        else:
            repair = "rewrite the index" if real else "find the file that holds it, or " + AGAIN
        said, real = said or "no file", f"it is in {real}" if real else "no file holds it"
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        found, wanted = f"index: {said}; {real}{more}", "the file that holds it"
        yield finding(
            "index-mismatch", min(names), file=INDEX, found=found, wanted=wanted, repair=repair
        )


def _total_size(ckpt: Checkpoint, metadata: object) -> Iterator[Finding]:
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != ckpt.nbytes:
        found = str(total)[:40]
        wanted = f"{ckpt.nbytes} bytes of tensors"
        yield finding("total-size", "metadata.total_size", file=INDEX, found=found, wanted=wanted)


def _stray_shards(subject: Subject) -> Iterator[Finding]:
    """Top-level safetensors files that are neither shards nor side files of the source.

    transformers reads model.safetensors alone where there is no index; vLLM every *.safetensors
    (model_loader/default_loader.py, `_prepare_weights`), and of two tensors the last one.
    """
    indexed = (subject.ckpt.path / INDEX).exists()
    shards = {header.file.name for header in subject.ckpt.headers}
    known = {str(path) for path in (subject.source or subject.ckpt).side_files()}
    for path in sorted(subject.ckpt.path.glob("*.safetensors")):
        if path.name in shards:
            continue
        again = sorted(tensors_in(path) & subject.ckpt.tensors.keys())
        if again and not indexed:
            found = f"{len(again)} tensors that {min(shards)} holds too"
            wanted = "each tensor once, or an index"
            yield finding("stray-weights", again[0], file=path, found=found, wanted=wanted)
        elif path.name not in known:
            found = "a file that is not in the index"
            yield finding("stray-shard", file=path, found=found, wanted="only the index's files")


def _side_files(ckpt: Checkpoint, source: Checkpoint) -> Iterator[Finding]:
    weights = [str(path) for path in source.side_files() if path.suffix in WEIGHT_FORMATS]
    for name in (*SERVING, *weights):
        there, original = ckpt.path / name, source.path / name
        if not original.is_file():
            continue
        if not there.is_file():
            found = "no such file"
            wanted = "the source's"
            repair = f"copy {name} from the source"
            yield finding("side-file-missing", file=name, found=found, wanted=wanted, repair=repair)
        elif name == TOKENIZER and (parts := unlike_parts(there, original)):
            found, repair = f"different {listed(parts, SHOWN)}", f"copy {name} from the source"
            yield finding(
                "tokenizer-differs", parts[0], file=name, found=found, wanted="the source's",
                repair=repair,
            )  # fmt: skip
        elif name not in weights and there.read_bytes() != original.read_bytes():
            found = f"{there.stat().st_size} bytes"
            wanted = f"the source's {original.stat().st_size} bytes"
            yield finding("side-file-differs", file=name, found=found, wanted=wanted)


def _config(
    found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str, resolved: Resolved
) -> Iterator[Finding]:
    for key in sorted(found.keys() | wanted.keys()):
        ours, theirs = found.get(key, ABSENT), wanted.get(key, ABSENT)
        if key in FREE or _same(ours, theirs):
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict) and key not in WHOLE:
            yield from _config(ours, theirs, f"{prefix}{key}.", resolved)
            continue
        both = ours is not ABSENT and theirs is not ABSENT
        differs = not HARMLESS.search(key) and (both or _means_another(prefix, key, resolved()))
        code = "config-differs" if differs else "config-note"
        yield finding(
            code, f"{prefix}{key}", file=CONFIG, found=_shown(ours), wanted=_shown(theirs)
        )


def _resolved(ckpt: Checkpoint, source: Checkpoint) -> Configs | None:
    """Both configs with transformers' defaults; None if it cannot read one."""
    from ckptq.models.tree.transformers_model import read_config

    try:
        return read_config(ckpt).to_dict(), read_config(source).to_dict()
    except CkptqError:
        return None


def _means_another(prefix: str, key: str, configs: Configs | None) -> bool:
    """Whether a field that one config lacks differs from its default there. A field without a
    default is not read by anything. All RoPE fields end up in one."""
    if configs is None:
        return False
    values: list[Any] = []
    for config in configs:
        value: Any = config
        for name in prefix.split(".")[:-1]:
            value = value.get(name) if isinstance(value, dict) else None
        about = "rope_parameters" if key.startswith("rope") else key
        values.append(value.get(about, ABSENT) if isinstance(value, dict) else ABSENT)
    return ABSENT not in values and not _same(values[0], values[1])


def _same(ours: object, theirs: object) -> bool:
    """NaN is no number, and yet the same field."""
    if ABSENT in (ours, theirs):
        return False
    return ours == theirs or json.dumps(ours, sort_keys=True, default=str) == json.dumps(
        theirs, sort_keys=True, default=str
    )


def _shown(value: object) -> str:
    return "nothing" if value is ABSENT else json.dumps(value, default=str)[:120]
