"""What of the library reads something of unknown origin, and with which input it is tried."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from kandinsky_diffusers.conversion import ConversionError, convert, inspect, plan_source
from kandinsky_diffusers.conversion.files import copy_tokenizer, tokenizer_check
from kandinsky_diffusers.conversion.planning import plan_model
from kandinsky_diffusers.conversion.reader import open_weights
from kandinsky_diffusers.conversion.recipe import Inputs
from kandinsky_diffusers.conversion.repository import Output, RepoWriter, write_config
from kandinsky_diffusers.conversion.staging import Staging
from kandinsky_diffusers.k3.ip_adapter_variants import IMAGE_ENCODER
from kandinsky_diffusers.k3.variants import RELEASE_31
from kandinsky_diffusers.k21.variants import CLIP_IMAGE_ENCODER, CLIP_TEXT_ENCODER, MCLIP

from . import adapters, pictures
from . import mutations as hostile
from .pickling import KNOWN, dumps
from .sandbox import Target, written


Act = Callable[[], Any]

T5 = next(model for model in RELEASE_31.models if model.class_name == "T5EncoderModel")
GZIP_BOMB = gzip.compress(bytes(2**27), 1)

# settings that a configuration should not be able to make
SETTINGS = (
    "num_labels",
    "id2label",
    "attn_implementation",
    "num_hidden_layers",
    "num_layers",
    "quantization_config",
    "to_diff_dict",
    "per_layer_config",
    "auto_map",
    "_name_or_path",
    "hidden_size",
    "torch_dtype",
    "rope_scaling",
    "layers_per_block",
    "block_out_channels",
)


class Sources:
    """Real files, to begin with.

    Args:
        lora: a release of a LoRA.
        ip_adapter: a release of an IP-Adapter.
        of_21: a release of Kandinsky 2.1.
        of_31: a release of Kandinsky 3.1.
        adapter: a converted IP-Adapter.
        settings: the original's configuration of 2.1.
    """

    def __init__(self, lora: Path, ip_adapter: Path, of_21: Path, of_31: Path, adapter: Path, settings: Path) -> None:
        self.lora, self.ip_adapter, self.of_21, self.of_31, self.adapter = lora, ip_adapter, of_21, of_31, adapter
        self.settings = json.loads(settings.read_text())
        tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).half()}
        self.small = _saved(tensors)
        self.legacy = _saved(tensors, _use_new_zipfile_serialization=False)
        paths = (
            lora / "pytorch_model.bin",
            of_21 / "prior_fp16.ckpt",
            of_21 / "text_encoder" / "pytorch_model.bin",
            of_31 / "weights" / "movq.pt",
            ip_adapter / "unet" / "diffusion_pytorch_model.safetensors",
        )
        self.shapes = [{key: list(shape) for key, shape in open_weights(path).shapes.items()} for path in paths]
        self.safetensors = (ip_adapter / "image_encoder" / "model.safetensors").read_bytes()


def _saved(tensors: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file, **options)
    return file.getvalue()


def targets(sources: Sources) -> dict[str, Target]:
    """All targets by name."""
    weights = ConversionError
    found = [
        Target("zip", partial(_zip, sources), (weights,)),
        Target("legacy", partial(_legacy, sources), (weights,)),
        Target("damaged weights", partial(_damaged, sources), (weights,)),
        Target("safetensors", partial(_safetensors, sources), (weights,)),
        Target("index", partial(_index, sources), (weights,)),
        Target("inventory", _inventory, (weights,)),
        Target("shapes", partial(_shapes, sources), (weights,)),
        Target("configuration", partial(_configuration, sources), (weights,)),
        Target("original configuration", partial(_original, sources), (weights,)),
        Target("tokenizer", partial(_tokenizer, sources), (weights,)),
        Target("conversion", partial(_conversion, sources), (weights,)),
        Target("output", partial(_output, sources), (weights,)),
    ]
    others = (*adapters.targets(sources.lora, sources.adapter), *pictures.targets())
    return {target.name: target for target in (*found, *others)}


# ------------------------------------------------------------------------------------------------------------- weights
def _read_all(path: Path) -> None:
    inspect(path)
    file = open_weights(path)
    for key in list(file.shapes)[:20]:
        try:
            file.tensor(key)
        except ConversionError:  # not a tensor
            continue


def _zip(sources: Sources, random: Random, case: Path) -> Act:
    content = hostile.torch_archive(random, sources.small)
    return partial(_read_all, written(case / "in" / random.choice(("a.ckpt", "a.pt", "a.bin")), content))


def known_files(sources: Sources) -> dict[str, bytes]:
    """What has once brought the library or PyTorch down, as files of `torch.save`."""
    files = {name: hostile.archive_with(sources.small, pickle) for name, pickle in KNOWN.items()}
    padded = dumps({"a": 1}) + bytes(2**27)
    return files | {"128 MiB in 128 KiB": hostile.archive_with(sources.small, padded, zipfile.ZIP_DEFLATED)}


def known_target(content: bytes) -> Target:
    """Reads one of these."""

    def make(random: Random, case: Path) -> Act:
        return partial(_read_all, written(case / "in" / "a.ckpt", content))

    return Target("known file", make, (ConversionError,))


def _legacy(sources: Sources, random: Random, case: Path) -> Act:
    content = sources.legacy
    start = content.index(b"\x80\x02}", 60)  # of the pickle with the tensors
    match random.randrange(4):
        case 0:
            content = hostile.hostile_pickle(random, content)
        case 1:
            content = content[:start] + hostile.hostile_pickle(
                random, content[start : content.index(b".\x80\x02", start) + 1]
            )
        case 2:
            content = hostile.damaged(random, content, sources.small)
        case 3:
            content = hostile.hostile_pickle(random, content) + content
    return partial(_read_all, written(case / "in" / "a.pt", content))


def _damaged(sources: Sources, random: Random, case: Path) -> Act:
    paths = (
        sources.lora / "pytorch_model.bin",
        sources.of_21 / "ViT-L-14_stats.th",
        sources.of_21 / "prior_fp16.ckpt",
    )
    path = random.choice(paths)
    content = hostile.damaged(random, path.read_bytes(), sources.safetensors)
    return partial(_read_all, written(case / "in" / path.name, content))


def _safetensors(sources: Sources, random: Random, case: Path) -> Act:
    return partial(
        _read_all, written(case / "in" / "model.safetensors", hostile.safetensors(random, sources.safetensors))
    )


def _index(sources: Sources, random: Random, case: Path) -> Act:
    folder = case / "in"
    written(folder / "one.safetensors", sources.safetensors)
    written(case / "outside" / "x.safetensors", sources.safetensors)
    (folder / "link.safetensors").symlink_to("one.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    keys = list(open_weights(folder / "one.safetensors").shapes)
    names = (
        "one.safetensors",
        "link.safetensors",
        "loop.safetensors",
        "model.safetensors.index.json",
        "../outside/x.safetensors",
        "in",
    )
    names = (*names, *hostile.PATHS)
    homes: dict[str, Any] = dict.fromkeys(keys, random.choice((*names[:2] * 6, *names)))
    homes |= {
        random.choice((*keys, "surplus")): random.choice((*names, 3, None)) for _ in range(random.choice((0, 1, 2)))
    }
    content = random.choice(({"weight_map": homes}, hostile.changed(random, {"weight_map": homes, "metadata": {}})))
    path = folder / "model.safetensors.index.json"
    path.write_bytes(hostile.json_text(random, content))
    return partial(_read_all, path)


def _inventory(random: Random, case: Path) -> Act:
    shapes = {"text_projection.weight": [4, 4], "visual_projection.weight": [4, 4], "logit_scale": []}
    content = hostile.json_text(random, hostile.changed(random, {"tensors": shapes}))
    if random.random() < 0.4:
        content = random.choice((gzip.compress(content), GZIP_BOMB))
        content = hostile.damaged(random, content) if random.random() < 0.5 else content
        return partial(plan_source, written(case / "in" / "a.json.gz", content))
    return partial(plan_source, written(case / "in" / "a.json", content))


def _shapes(sources: Sources, random: Random, case: Path) -> Act:
    """Other shapes, names and numbers of layers, in inventories: rules and models are made for these."""
    shapes = dict(random.choice(sources.shapes))
    keys = list(shapes)
    for key in random.sample(keys, random.choice((1, 1, 3))):
        match random.randrange(5):
            case 0:
                shapes[key] = [random.choice((0, 1, 2, 3, 7, 10**6, 2**40, 2**62)) for _ in shapes[key]]
            case 1:
                shapes[key] = shapes[key] + [1] * random.randrange(3) if random.random() < 0.5 else shapes[key][1:]
            case 2:
                del shapes[key]
            case 3:
                number = random.choice(("0", "9", "99999999999", "00", "1" * 400))
                shapes["".join(number if c.isdigit() else c for c in key)] = shapes[key]
            case 4:
                parts = key.split(".")
                copies = random.choice((3, 300, 5000))
                shapes |= {".".join((*parts[:1], str(n), *parts[2:])): shapes[key] for n in range(copies)}
    return partial(plan_source, written(case / "in" / "a.json", json.dumps({"tensors": shapes}).encode()))


# ------------------------------------------------------------------------------------------------------ configurations
def _linked(source: Path, target: Path) -> Path:
    """A copy of a release, with links for its weights, as downloads of the Hub have them."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif path.stat().st_size > 20_000:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
        else:
            written(place, path.read_bytes())
    return target


def _change_json(random: Random, path: Path) -> None:
    path.write_bytes(hostile.json_text(random, hostile.changed(random, json.loads(path.read_text()), SETTINGS)))


def _configuration(sources: Sources, random: Random, case: Path) -> Act:
    """The configuration beside the weights of a model."""
    folder, weights, component = random.choice(
        (
            (sources.of_21 / "clip", "model.safetensors", CLIP_TEXT_ENCODER),
            (sources.of_21 / "clip", "model.safetensors", CLIP_IMAGE_ENCODER),
            (sources.of_21 / "text_encoder", "pytorch_model.bin", MCLIP),
            (sources.of_31 / "weights" / "flan_ul2_encoder", "model.safetensors", T5),
            (sources.ip_adapter / "image_encoder", "model.safetensors", IMAGE_ENCODER),
        )
    )
    place = case / "in" / folder.name
    place.mkdir()
    shutil.copyfile(folder / "config.json", place / "config.json")
    _change_json(random, place / "config.json")
    folders = {"release": case / "in", "clip": place}

    def act() -> None:
        inputs = Inputs(folders, {component.parts[0].file: open_weights(folder / weights)})
        model = plan_model(component, inputs)
        (case / "out").mkdir()
        write_config(model, RepoWriter(case, inputs, {}, Output()).entries(model), case / "out")

    return act


def _original(sources: Sources, random: Random, case: Path) -> Act:
    content = hostile.json_text(random, hostile.changed(random, hostile.changed(random, sources.settings)))
    config = written(case / "in" / "config.json", content)
    path = sources.of_21 / random.choice(("prior_fp16.ckpt", "prior_fp16.ckpt", "decoder_fp16.ckpt"))
    return partial(plan_source, path, original_config=config)


def _tokenizer(sources: Sources, random: Random, case: Path) -> Act:
    folder, class_name = random.choice(
        (
            (sources.of_21 / "clip", "CLIPTokenizer"),
            (sources.of_21 / "text_encoder", "XLMRobertaTokenizer"),
            (sources.of_31 / "weights" / "flan_ul2_encoder", "T5Tokenizer"),
        )
    )
    release = case / "in" / "release"
    release.mkdir()
    for path in folder.iterdir():
        if path.suffix in (".json", ".txt", ".model") and path.stat().st_size < 20_000:
            shutil.copyfile(path, release / path.name)
    if random.random() < 0.5:
        (release / "tokenizer.json").unlink(missing_ok=True)
    path = random.choice(sorted(release.iterdir()))
    if path.suffix == ".json" and random.random() < 0.7:
        _change_json(random, path)
    else:
        path.write_bytes(hostile.damaged(random, path.read_bytes()))
    inputs = Inputs({"clip": release})

    def act() -> None:
        tokenizer_check(inputs, root="clip", folder="")
        with Staging(case / "out") as staging:
            copy_tokenizer(inputs, staging.folder / "tokenizer", root="clip", folder="", class_name=class_name)
            staging.commit()

    return act


# -------------------------------------------------------------------------------------------------- whole conversions
def _conversion(sources: Sources, random: Random, case: Path) -> Act:
    """A release with one bad file, from the beginning to the end."""
    release, out = case / "in" / "release", case / "out"
    if random.random() < 0.6:
        content = (sources.lora / "pytorch_model.bin").read_bytes()
        content = random.choice((hostile.damaged, hostile.torch_archive))(random, content)
        return partial(
            convert,
            written(release / "pytorch_model.bin", content).parent,
            out,
            version="3-lora",
            verify=random.random() < 0.3,
        )
    _linked(sources.ip_adapter, release)
    if random.random() < 0.5:
        _change_json(random, random.choice(list(release.glob("image_*/*.json"))))
    else:
        path = release / "image_encoder" / "model.safetensors"
        path.unlink()
        path.write_bytes(hostile.safetensors(random, sources.safetensors))
    return partial(convert, release, out, verify=random.random() < 0.3)


def _output(sources: Sources, random: Random, case: Path) -> Act:
    """A good release, and an output folder with links and remains that lead out of it."""
    out, outside = case / "out", case / "outside"
    (outside / "kandinsky-3-lora").mkdir()
    written(outside / "replaced" / "kandinsky-3-lora" / "keep.txt", b"keep me")
    out.mkdir()
    for name in random.sample(("kandinsky-3-lora", ".kandinsky-diffusers-a", ".kandinsky-diffusers-b", "other"), 2):
        match random.randrange(5):
            case 0:
                (out / name).symlink_to(outside)
            case 1:
                (out / name).symlink_to(outside / "missing")
            case 2:
                (out / name).mkdir()
                (out / name / random.choice(("lock", "replaced", "new", "x"))).symlink_to(
                    random.choice((outside, outside / "keep.txt"))
                )
            case 3:
                (out / name).write_text("a file")
            case 4:
                (out / name).symlink_to(name)
    source = random.choice(
        (sources.lora, sources.lora, case / "in" / "../../outside", Path("../x"), Path("../../x/y"))
    )
    return partial(convert, source, out, version="3-lora", overwrite=random.random() < 0.7)
