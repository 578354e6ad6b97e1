"""Small inputs that are nearly right, made by strategies: names, configs, offsets, indices, bits,
recipes, tokenizers, scales, journals. Each function makes one in a folder."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny.trials import places

Json = Any

# Values


def junk(rng: random.Random, depth: int = 0) -> Json:
    """Something that nobody asked for."""
    plain: list[Callable[[], Json]] = [
        lambda: None,
        lambda: rng.choice((True, False)),
        lambda: rng.choice((-1, 0, 1, 7, 64, 128, 1 << 31, 1 << 62, -(1 << 70), 10**30)),
        lambda: rng.choice((0.0, -0.5, 1e308, float("nan"), float("inf"), -float("inf"), 1e-320)),
        lambda: word(rng),
    ]
    if depth < 3:
        plain += [
            lambda: [junk(rng, depth + 1) for _ in range(rng.randrange(4))],
            lambda: {word(rng): junk(rng, depth + 1) for _ in range(rng.randrange(4))},
        ]
    return rng.choice(plain)()


def word(rng: random.Random) -> str:
    return rng.choice(
        (
            "", " ", "x", "Linear", "re:", "re:.*", "re:(", "re:(a|aa)+$", "re:(.*)*(.*)*x",
            "weight",
            "llama", "float", "int", "channel", "group", "tensor", "attn_head", "F8_E4M3", "BF16",
            "../../etc/passwd", "/dev/zero", "model.safetensors", "\ud800", "\udc00x", "a\x1b[2Jb",
            "a\nerror: b", "\u202eabc", "\0", "x" * 5000, "[/x]", "[red]", "{}", "%s%n", "$(ls)",
            "__metadata__", "None", "nan", "1e400", "٣", "e\u0301", "\U0001f600", "torch.uint8",
            "LlamaForCausalLM", "LlamaAttention", "compressed-tensors", "pack-quantized",
        )
    )  # fmt: skip


def mutated(rng: random.Random, value: Json, times: int = 1) -> Json:
    """The same JSON with some of its places changed, taken away, or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        found = places(value)
        if not found:
            return junk(rng)
        holder, key = rng.choice(found)
        how = rng.choice(("junk", "junk", "drop", "grow", "rename", "deep"))
        if how == "drop":
            del holder[key]
        elif how == "grow" and isinstance(holder, list):
            holder[key:key] = [junk(rng) for _ in range(rng.choice((1, 3, 300)))]
        elif how == "rename" and isinstance(holder, dict):
            holder[word(rng)] = holder.pop(key)
        elif how == "deep":
            for _ in range(rng.choice((2, 50, 400))):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        else:
            holder[key] = junk(rng)
    return value


def text_of(rng: random.Random, value: Json) -> bytes:
    """JSON as files hold it, now and then not quite."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    except RecursionError:
        text = "[" * 2000 + "]" * 2000
    data = text.encode("utf-8", "surrogatepass")
    how = rng.random()
    if how < 0.03:
        return data[: rng.randrange(len(data) + 1)]
    if how < 0.06:
        return data.replace(b'"', b"'", 2)
    if how < 0.09:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" " * 9, b"\0")) + data
    if how < 0.12:
        return b"[" * rng.choice((10, 990, 5000)) + data
    return data


# Checkpoints

H, I, VOCAB = 32, 64, 16

CONFIG: dict[str, Json] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": H,
    "intermediate_size": I, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCAB, "dtype": "bfloat16",
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip

ARGS = {
    "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False,
    "group_size": None, "block_structure": None, "scale_dtype": None, "actorder": None,
    "observer": "memoryless_minmax",
}  # fmt: skip

CACHE = {**ARGS, "strategy": "tensor", "observer": "static_minmax"}
TOKEN = {**ARGS, "strategy": "token", "dynamic": True, "observer": None}

QUANTIZATION = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "quantization_status": "compressed", "kv_cache_scheme": CACHE,
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": ARGS, "input_activations": TOKEN},
        "attention": {"targets": ["LlamaAttention"], "weights": None, "input_activations": CACHE},
    },
}  # fmt: skip


def shapes() -> dict[str, list[int]]:
    layer = "model.layers.0"
    return {
        "model.embed_tokens.weight": [VOCAB, H],
        f"{layer}.self_attn.q_proj.weight": [32, H],
        f"{layer}.self_attn.k_proj.weight": [16, H],
        f"{layer}.self_attn.v_proj.weight": [16, H],
        f"{layer}.self_attn.o_proj.weight": [H, 32],
        f"{layer}.mlp.gate_proj.weight": [I, H],
        f"{layer}.mlp.up_proj.weight": [I, H],
        f"{layer}.mlp.down_proj.weight": [H, I],
        f"{layer}.input_layernorm.weight": [H],
        f"{layer}.post_attention_layernorm.weight": [H],
        "model.norm.weight": [H],
        "lm_head.weight": [VOCAB, H],
    }


SIZES = {"BF16": 2, "F32": 4, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "I32": 4, "F64": 8}


def header_of(tensors: dict[str, tuple[str, list[int]]]) -> dict[str, Json]:
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        count = SIZES.get(dtype, 2)
        for size in shape:
            count *= size
        offsets = [at, at + count]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}  # type: ignore[dict-item]
        at += count
    return entries


def write_shard(rng: random.Random, file: Path, header: Json, size: int | None = None) -> None:
    text = text_of(rng, header) if rng.random() < 0.05 else json.dumps(header).encode()
    if size is None:
        entries = [e for e in header.values() if isinstance(e, dict) and "data_offsets" in e]
        ends = [e["data_offsets"][1] for e in entries if isinstance(e["data_offsets"], list)]
        size = max([end for end in ends if isinstance(end, int)], default=0)
    data = rng.randbytes(min(max(size, 0), 200_000))
    data = bytes(b & 0x3F for b in data)  # finite in bf16 and FP8
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def checkpoint(rng: random.Random, folder: Path) -> dict[str, tuple[str, list[int]]]:
    """A sound one, now and then quantized."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: ("BF16", shape) for name, shape in shapes().items()}
    config = dict(CONFIG)
    if rng.random() < 0.5:
        config["quantization_config"] = QUANTIZATION
        for name in [n for n in tensors if "_proj" in n]:
            tensors[name] = ("F8_E4M3", tensors[name][1])
            tensors[f"{name}_scale"] = ("BF16", [tensors[name][1][0], 1])
        for which in "qkv":
            tensors[f"model.layers.0.self_attn.{which}_scale"] = ("BF16", [1])
    (folder / "config.json").write_text(json.dumps(config))
    write_shard(random.Random(0), folder / "model.safetensors", header_of(tensors))
    return tensors


def sound(folder: Path) -> None:
    """An unquantized checkpoint with nothing strange in it, and text for it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: ("BF16", shape) for name, shape in shapes().items()}
    write_shard(random.Random(0), folder / "model.safetensors", header_of(tensors))
    (folder / "rows.jsonl").write_text('{"input_ids": [1, 2, 3, 4]}\n' * 2)


# Strategies: each makes a folder on which a command runs.


def strange_names(rng: random.Random, folder: Path) -> None:
    tensors = checkpoint(rng, folder)
    for _ in range(rng.choice((1, 2, 6))):
        name = rng.choice(list(tensors))
        parts = name.split(".")
        at = rng.randrange(len(parts))
        parts[at] = rng.choice(
            (
                "", "0", "00", "-1", "999999999999999999", "9" * 4000, "٣", "1e3", "layers",
                "experts",
                "3", "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx",
                "k_scale", "qweight", "bias", "gate_up_proj", "lora_A", "base_layer", word(rng),
                "x" * 4090,
            )
        )  # fmt: skip
        new = ".".join(parts) + rng.choice(("", "", "", ".", ".weight", ".0"))
        if rng.random() < 0.3:
            tensors[new] = tensors[name]
        else:
            tensors[new] = tensors.pop(name)
    if rng.random() < 0.1:
        tensors |= {f"{word(rng)}.{i}.weight": ("BF16", [2, 2]) for i in range(3000)}
    write_shard(rng, folder / "model.safetensors", header_of(tensors))


def strange_config(rng: random.Random, folder: Path) -> None:
    checkpoint(rng, folder)
    config = json.loads((folder / "config.json").read_text())
    inner = "quantization_config" if rng.random() < 0.5 else None
    if inner:
        config[inner] = mutated(rng, config.get(inner, QUANTIZATION), rng.choice((1, 1, 3)))
    else:
        config = mutated(rng, config, rng.choice((1, 1, 2, 5)))
    if rng.random() < 0.1 and isinstance(config, dict):
        config = {"text_config": config, "model_type": rng.choice(("llama4", "gemma3", word(rng)))}
    (folder / "config.json").write_bytes(text_of(rng, config))


def strange_offsets(rng: random.Random, folder: Path) -> None:
    tensors = checkpoint(rng, folder)
    header = header_of(tensors)
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice([n for n in header if n != "__metadata__"])
        entry: Any = header[name]
        if not isinstance(entry, dict):
            continue
        field = rng.choice(("shape", "data_offsets", "dtype", "all"))
        if field == "shape":
            now = entry.get("shape") if isinstance(entry.get("shape"), list) else [1]
            entry["shape"] = rng.choice(
                ([], [0], [0, 1 << 60], [1 << 62, 1 << 62, 0], [1] * 70, [-1], [1.5], [True],
                 None, "32", [[32]], now[::-1], [1, *now], junk(rng))
            )  # fmt: skip
        elif field == "data_offsets":
            a, b = 0, 2
            if isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2:
                a, b = entry["data_offsets"]
            entry["data_offsets"] = rng.choice(
                ([b, a], [a, b, b], [a], [], [a - 1, b - 1], [a + 2, b + 2], [a, 1 << 63],
                 [-(1 << 63), b], [str(a), b], [float(a), b], [a, a], junk(rng))
            )  # fmt: skip
        elif field == "dtype":
            entry["dtype"] = rng.choice(
                (*SIZES, "F8_E8M0", "BOOL", "C64", "F4", "", None, junk(rng))
            )
        else:
            header[name] = junk(rng)  # type: ignore[assignment]
    if rng.random() < 0.1:
        header["__metadata__"] = junk(rng)  # type: ignore[assignment]
    size = rng.choice((None, 0, 100, 100_000))
    try:
        write_shard(rng, folder / "model.safetensors", header, size)
    except (TypeError, KeyError, IndexError):
        write_shard(rng, folder / "model.safetensors", header, 1000)
    if rng.random() < 0.1:
        data = (folder / "model.safetensors").read_bytes()
        length = rng.choice((0, 1, 1 << 20, 99_999_999, 100_000_001, 1 << 62, (1 << 64) - 1))
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + data[8:])


def strange_index(rng: random.Random, folder: Path) -> None:
    tensors = checkpoint(rng, folder)
    names = list(tensors)
    half = {n: tensors[n] for n in names[::2]}
    (folder / "model.safetensors").unlink()
    write_shard(random.Random(1), folder / "a.safetensors", header_of(half))
    rest = {n: tensors[n] for n in names[1::2]}
    write_shard(random.Random(2), folder / "b.safetensors", header_of(rest))
    files = {n: f"{'a' if n in half else 'b'}.safetensors" for n in names}
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    for _ in range(rng.choice((1, 2))):
        weight_map = index["weight_map"]
        if rng.random() < 0.5 and isinstance(weight_map, dict) and weight_map:
            targets = (
                "b.safetensors",
                "config.json",
                "..",
                ".",
                "",
                "a.safetensors/",
                "A.safetensors",
            )
            weight_map[rng.choice(list(weight_map))] = rng.choice((*targets, word(rng)))
        else:
            index = mutated(rng, index)
            if not isinstance(index, dict) or "weight_map" not in index:
                break
    (folder / "model.safetensors.index.json").write_bytes(text_of(rng, index))


def strange_data(rng: random.Random, folder: Path) -> None:
    """Sound headers over any bits: NaN, infinities, denormals, negative zero."""
    checkpoint(rng, folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.choice((1, 5, 50))):
        at = rng.randrange(start, len(data) - 4)
        data[at : at + 2] = rng.choice(
            (b"\x80\x7f", b"\xc0\x7f", b"\x00\x80", b"\x01\x00", b"\x7f\x7f")
        )
    if rng.random() < 0.2:
        data[start:] = bytes(len(data) - start)
    file.write_bytes(data)


SIDE_FILES: dict[str, Json] = {
    "generation_config.json": {
        "bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6,
        "top_p": 0.9, "transformers_version": "5.17.0",
    },
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8,
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
    },
    "special_tokens_map.json": {"bos_token": {"content": "<s>", "lstrip": False}},
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", "size": 224},
    "hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {}},
    "params.json": {"dim": H, "n_layers": 1},
}  # fmt: skip


def strange_side_files(rng: random.Random, folder: Path) -> None:
    """Files beside the weights, with anything in them or in their place."""
    checkpoint(rng, folder)
    for name in rng.sample(list(SIDE_FILES), rng.choice((1, 2, 4))):
        value = mutated(rng, SIDE_FILES[name], rng.choice((1, 1, 3)))
        (folder / name).write_bytes(text_of(rng, value))
    how = rng.choice(("", "", "folder", "link", "dangling", "pipe", "loop", "name", "weights"))
    if how == "folder":
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "generation_config.json").mkdir()
    elif how == "link":
        (folder / "notes.txt").symlink_to("/dev/zero")
    elif how == "dangling":
        (folder / "notes.txt").symlink_to(folder / "nowhere")
    elif how == "pipe":
        os.mkfifo(folder / rng.choice(("notes.txt", "tokenizer.json", "chat_template.jinja")))
    elif how == "loop":
        (folder / "more").symlink_to(folder)
    elif how == "name":
        (folder / rng.choice(("a\nb", "\x1b[2J", "x" * 255, "\udcff", " ", "-rf"))).write_text("x")
    elif how == "weights":
        file = folder / rng.choice(("pytorch_model.bin", "adapter_model.safetensors", "x.gguf"))
        file.write_bytes(rng.randbytes(99))


def strange_task(rng: random.Random, folder: Path) -> None:
    """Questions, and a tokenizer for them."""
    sound(folder)
    (folder / "tokenizer.json").write_text(json.dumps(plain_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    questions = [
        {"prompt": "a b", "answer": "c"},
        {"prompt": "a c", "answer": "b d"},
    ]
    made = mutated(rng, questions, rng.choice((0, 1, 2, 4)))
    lines = [text_of(rng, line) for line in made] if isinstance(made, list) else [b"[]"]
    (folder / "task.jsonl").write_bytes(b"\n".join(lines))


RECIPE = {
    "quantization_stage": {
        "quantization_modifiers": {
            "QuantizationModifier": {
                "ignore": ["lm_head"],
                "config_groups": {
                    "group_0": {"targets": ["Linear"], "weights": ARGS, "format": None},
                    "attention": {"targets": ["LlamaAttention"], "input_activations": CACHE},
                },
                "kv_cache_scheme": CACHE,
            }
        }
    }
}


def strange_recipe(rng: random.Random, folder: Path) -> None:
    import yaml

    checkpoint(rng, folder)
    recipe = mutated(rng, RECIPE, rng.choice((1, 1, 2, 5)))
    how = rng.random()
    if how < 0.5:
        try:
            text = yaml.safe_dump(recipe, allow_unicode=True)
        except (RecursionError, yaml.YAMLError):
            text = "[" * 3000
    elif how < 0.7:
        text = json.dumps(recipe)
    else:
        text = yaml.safe_dump(RECIPE)
        for _ in range(rng.choice((1, 3))):
            lines = text.split("\n")
            at = rng.randrange(len(lines))
            lines[at] = rng.choice(
                (
                    lines[at] + "  x", "\t" + lines[at], lines[at].replace(":", ""),
                    "- " + lines[at], "&a " + lines[at], "*a", "<<: *b", "!!python/none x",
                    "? " + lines[at], "%YAML 9",
                    "---", "...", "key: |", "a: >-", "x: 2020-13-45", "y: 0x", "z: 1_000", "'", '"',
                    "{" * 900, "a: " * 900, "\u0085", "\ufeff", "\x07", lines[at] * 50,
                )
            )  # fmt: skip
            text = "\n".join(lines)
    (folder / "recipe.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))


def plain_tokenizer() -> dict[str, Json]:
    """Letters are tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(VOCAB)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return dict(json.loads(tokenizer.to_str()))


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "a", "model_max_length": 8,
    "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
}  # fmt: skip


def strange_tokenizer(rng: random.Random, folder: Path) -> None:
    sound(folder)
    tokenizer = plain_tokenizer()
    parts: dict[str, list[Json]] = {
        "normalizer": [
            {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "b"},
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
            {"type": "Prepend", "prepend": "x" * 1000},
        ],
        "pre_tokenizer": [
            {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated",
             "invert": False},
            {"type": "WhitespaceSplit"},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
             "use_regex": True},
        ],
        "post_processor": [
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
             "pair": [], "special_tokens": {}},
        ],
        "truncation": [
            {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9},
        ],
        "padding": [
            {"strategy": {"Fixed": 1 << 60}, "direction": "Right", "pad_to_multiple_of": 0,
             "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
        ],
        "added_tokens": [
            [{"id": 99, "content": "", "single_word": False, "lstrip": True, "rstrip": True,
              "normalized": True, "special": True}],
            [{"id": 1 << 31, "content": "zz", "single_word": False, "lstrip": True, "rstrip": True,
              "normalized": True, "special": True}],
        ],
        "model": [
            {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
            {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0]]},
            {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 0, "vocab": {"a": 0}},
            {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 4294967295}},
        ],
    }  # fmt: skip
    for _ in range(rng.choice((1, 2))):
        part = rng.choice(list(parts))
        tokenizer[part] = rng.choice(parts[part])
        if rng.random() < 0.4:
            tokenizer = mutated(rng, tokenizer)
            if not isinstance(tokenizer, dict):
                break
    (folder / "tokenizer.json").write_bytes(text_of(rng, tokenizer))
    kind = mutated(rng, TOKENIZER_CONFIG) if rng.random() < 0.3 else TOKENIZER_CONFIG
    (folder / "tokenizer_config.json").write_bytes(text_of(rng, kind))
    rows = [
        {"text": "a b c d"},
        {"input_ids": [1, 2, 3]},
        {"messages": [{"role": "user", "content": "a"}]},
    ]
    if rng.random() < 0.4:
        rows = mutated(rng, rows)
    lines = [text_of(rng, row) for row in rows] if isinstance(rows, list) else [b"[]"]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))


def strange_scales(rng: random.Random, folder: Path) -> None:
    checkpoint(random.Random(1), folder)
    record = {
        "version": 1, "model": "x", "source_fingerprint": "y", "strategy": "tensor",
        "observer": "static_minmax", "observer_arguments": {}, "input_observer": "static_minmax",
        "text": "t", "samples": 1, "tokens": 1, "seq_len": 1, "batch_size": 1, "seed": 0,
        "token_digest": "z", "attention": {"model.layers.0.self_attn": "LlamaAttention"},
    }  # fmt: skip
    tensors = {f"model.layers.0.self_attn.{w}_scale": ("BF16", [1]) for w in "qkv"}
    tensors |= {f"model.layers.0.self_attn.{w}_amax": ("F32", [1]) for w in "qkv"}
    if rng.random() < 0.4:
        name = rng.choice(list(tensors))
        tensors[name] = (rng.choice(list(SIZES)), rng.choice(([], [0], [2], [1, 1, 1], [2, 1, 1])))
    header = header_of(tensors)
    if rng.random() < 0.7:
        record = mutated(rng, record)
    header["__metadata__"] = {"ckptq_scales": text_of(rng, record).decode("utf-8", "replace")}
    write_shard(rng, folder / "scales", header)


def strange_journal(rng: random.Random, folder: Path) -> None:
    """What an interrupted run has left, with anything in it."""
    from ckptq.checkpoint import journal
    from ckptq.convert.quantize import QuantizeRequest, quantize
    from ckptq.recipes.load import load_scheme

    checkpoint(random.Random(1), folder)
    out = folder.parent / "out"
    rename, journal.rename_new = journal.rename_new, _interrupted  # type: ignore[assignment]
    try:
        quantize(QuantizeRequest(model=folder, recipe=load_scheme("fp8-dynamic"), out=out))
    except KeyboardInterrupt:
        pass
    finally:
        journal.rename_new = rename
    partial = folder.parent / "out.partial"
    lines = [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()]
    lines = mutated(rng, lines, rng.choice((0, 1, 2)))
    texts = [text_of(rng, line) for line in lines] if isinstance(lines, list) else [b"{}"]
    (partial / "journal.jsonl").write_bytes(b"\n".join(texts) + rng.choice((b"\n", b"", b"\0\0")))
    if rng.random() < 0.2:
        (partial / "calibration").mkdir()
        file = partial / "calibration" / rng.choice(("run.json", "x"))
        file.write_bytes(text_of(rng, junk(rng)))
    if rng.random() < 0.2:
        file = partial / "checkpoint" / rng.choice(("model.safetensors", "x", "config.json"))
        file.write_bytes(rng.randbytes(99))
    if rng.random() < 0.2:
        (partial / "checkpoint").rename(out)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
