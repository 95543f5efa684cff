"""The prior with cached keys and values gives what stock's whole forward gives, under everything done to models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import PriorTransformer, attention_backend
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky_diffusers import cuda_graphs
from kandinsky_diffusers.compilation import compile_blocks
from kandinsky_diffusers.components import adopt
from kandinsky_diffusers.prior import CachedPriorTransformer, PriorPrefix, without_padding
from tests.test_cuda_graphs import StandIn


SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "embedding_dim": 12,
    "num_embeddings": 7,
}
TIMESTEPS = (999, 500, 0)


def random_prior(**config: Any) -> PriorTransformer:
    """Weights large enough for every token, position and layer to show in the output."""
    prior = PriorTransformer(**{**SIZES, **config}).eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return prior


def random_conditions(prior: PriorTransformer, batch: int = 3) -> dict[str, torch.Tensor]:
    config = prior.config
    width = config.embedding_proj_dim or config.embedding_dim
    lengths = torch.randint(1, config.num_embeddings + 1, (batch, 1))
    return {
        "proj_embedding": torch.randn(batch, width).to(prior.dtype),
        "encoder_hidden_states": torch.randn(batch, config.num_embeddings, config.embedding_dim).to(prior.dtype),
        "attention_mask": torch.arange(config.num_embeddings) < lengths,
    }


def random_embedding(prior: PriorTransformer, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, prior.config.embedding_dim).to(prior.dtype)


@torch.no_grad()
def stock_predictions(prior: PriorTransformer, x: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    assert type(prior) is PriorTransformer
    return torch.stack([prior(x, t, **conditions).predicted_image_embedding for t in TIMESTEPS])


@torch.no_grad()
def cached_predictions(prior: Any, x: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    prefix = prior(prefill=True, **conditions)
    return torch.stack([prior(x, t, prefix=prefix).predicted_image_embedding for t in TIMESTEPS])


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def stock() -> PriorTransformer:
    return random_prior()


@pytest.fixture
def conditions(stock: PriorTransformer) -> dict[str, torch.Tensor]:
    return random_conditions(stock)


@pytest.fixture
def x(stock: PriorTransformer) -> torch.Tensor:
    return random_embedding(stock)


@pytest.fixture
def expected(stock: PriorTransformer, x: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    return stock_predictions(stock, x, conditions)


@pytest.fixture
def prior(stock: PriorTransformer, expected: torch.Tensor) -> CachedPriorTransformer:
    return adopt(stock)


# ------------------------------------------------------------------------------------------------ numbers


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 16]),
    layers=st.integers(1, 4),
    width=st.integers(1, 20),
    text_tokens=st.integers(1, 20),
    prd=st.booleans(),
    norm_in=st.sampled_from([None, "layer"]),
    norm_text=st.sampled_from([None, "layer"]),
    text_width=st.sampled_from([None, 5]),
    output_width=st.sampled_from([None, 9]),
    batch=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_prefix_gives_the_same_prediction_for_any_size(
    heads: int,
    head_dim: int,
    layers: int,
    width: int,
    text_tokens: int,
    prd: bool,
    norm_in: str | None,
    norm_text: str | None,
    text_width: int | None,
    output_width: int | None,
    batch: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    stock = random_prior(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        embedding_dim=width,
        num_embeddings=text_tokens,
        added_emb_type="prd" if prd else None,
        additional_embeddings=4 if prd else 3,
        norm_in_type=norm_in,
        embedding_proj_norm_type=norm_text,
        embedding_proj_dim=text_width,
        clip_embed_dim=output_width,
    )
    x, conditions = random_embedding(stock, batch), random_conditions(stock, batch)
    expected = stock_predictions(stock, x, conditions)
    prior = adopt(stock)
    assert prior.supports_prefix
    assert_same(cached_predictions(prior, x, conditions), expected, 1e-5)


def test_every_input_matters(prior: CachedPriorTransformer, x: torch.Tensor, conditions: dict[str, Any]) -> None:
    usual = cached_predictions(prior, x, conditions)
    assert (usual[0] - usual[1]).abs().max() > 1e-3, "the timestep"
    others = {
        "proj_embedding": torch.randn_like(conditions["proj_embedding"]),
        "encoder_hidden_states": torch.randn_like(conditions["encoder_hidden_states"]),
        "attention_mask": torch.tensor([[True, False] * 3 + [True]] * 3),
    }
    for name, other in others.items():
        changed = cached_predictions(prior, x, {**conditions, name: other})
        assert (usual - changed).abs().amax(dim=(0, 2)).min() > 1e-3, name
    assert (usual - cached_predictions(prior, -x, conditions)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "mask",
    [[True] * 7, [False] * 7, [False, False, True, True, False, True, False], [True] + [False] * 6],
    ids=["all", "none", "with holes, not from the beginning", "one"],
)
def test_any_mask(mask: list[bool], stock: PriorTransformer, x: torch.Tensor, conditions: dict[str, Any]) -> None:
    conditions["attention_mask"] = torch.tensor([mask, [True] * 7, [True] * 3 + [False] * 4])
    expected = stock_predictions(stock, x, conditions)
    assert_same(cached_predictions(adopt(stock), x, conditions), expected)


@pytest.mark.parametrize(
    ("longest", "length"), [([False, False, True, False, True, False, False], 5), ([False] * 7, 0)]
)
def test_padding_of_all_texts_is_left_out_and_changes_nothing(
    longest: list[bool], length: int, stock: PriorTransformer, x: torch.Tensor, conditions: dict[str, Any]
) -> None:
    conditions["attention_mask"] = torch.tensor([longest, [False] * 7, longest[:4] + [False] * 3])
    expected = stock_predictions(stock, x, conditions)
    cut = without_padding(conditions)
    assert cut["attention_mask"].shape[1] == cut["encoder_hidden_states"].shape[1] == length
    assert_same(cached_predictions(adopt(stock), x, cut), expected)


def test_each_row_has_its_own_timestep(prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any) -> None:
    prefix = prior(prefill=True, **conditions)
    together = prior(x, torch.tensor(TIMESTEPS), prefix=prefix).predicted_image_embedding
    alone = [prior(x, t, prefix=prefix).predicted_image_embedding[i] for i, t in enumerate(TIMESTEPS)]
    assert_same(together, torch.stack(alone))


def test_a_tuple_on_request(prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any) -> None:
    prefix = prior(prefill=True, **conditions)
    (prediction,) = prior(x, 3, prefix=prefix, return_dict=False)
    assert torch.equal(prediction, prior(x, 3, prefix=prefix).predicted_image_embedding)


def test_without_a_prefix_it_is_the_stock_class_bit_for_bit(
    prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any, expected: torch.Tensor
) -> None:
    with torch.no_grad():
        actual = [prior(x, t, **conditions).predicted_image_embedding for t in TIMESTEPS]
    assert torch.equal(torch.stack(actual), expected)


@torch.no_grad()
@pytest.mark.parametrize("recorded", [False, True])
def test_prefixes_do_not_disturb_each_other(
    recorded: bool, prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any
) -> None:
    both = conditions, random_conditions(prior)
    expected = [cached_predictions(prior, x, each) for each in both]
    if recorded:
        cuda_graphs.graph(prior, StandIn())
    prefixes = [prior(prefill=True, **each) for each in both]
    for order in (0, 1), (1, 0):
        for t, timestep in enumerate(torch.tensor(TIMESTEPS)):
            for i in order:
                prediction = prior(x, timestep, prefix=prefixes[i]).predicted_image_embedding
                assert torch.equal(prediction, expected[i][t])


@torch.no_grad()
@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_copies_no_keys_of_the_prefix(
    recorded: bool, prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any
) -> None:
    if recorded:
        cuda_graphs.graph(prior, StandIn())
    prefix = prior(prefill=True, **conditions)
    *others, last = torch.tensor(TIMESTEPS)
    for timestep in (*others, last):
        prior(x, timestep, prefix=prefix)
    with _LargestCopy() as largest:
        prior(x, last, prefix=prefix)
    assert largest.numbers == 2 * len(x) * 3 * 2 * 8, "keys and values of the three tokens of the step"


@torch.no_grad()
def test_a_recorded_prior_looks_at_its_weights_once_a_call(
    prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, look = [], cuda_graphs._state_of
    monkeypatch.setattr(cuda_graphs, "_state_of", lambda *arguments: looked.append(arguments) or look(*arguments))
    cuda_graphs.graph(prior, StandIn())
    for _ in range(3):
        looked.clear()
        cached_predictions(prior, x, conditions)
    assert len(looked) == 1


class _LargestCopy(TorchDispatchMode):
    """How many numbers the largest copy has that is made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in _COPIES:
            self.numbers = max(self.numbers, output.numel())
        return output


_COPIES = [getattr(torch.ops.aten, name) for name in ("cat", "stack", "clone", "copy_", "constant_pad_nd")]


def test_a_prefix_made_in_inference_mode_serves_outside_of_it(
    prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any, expected: torch.Tensor
) -> None:
    with torch.inference_mode():
        prefix = prior(prefill=True, **conditions)
    with torch.no_grad():
        assert_same(prior(x, TIMESTEPS[0], prefix=prefix).predicted_image_embedding, expected[0])


# ------------------------------------------------------------------------------------------------ done to models


def test_model_offload(
    prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any, expected: torch.Tensor
) -> None:
    cpu_offload_with_hook(prior, torch.device("cpu"))
    assert_same(cached_predictions(prior, x, conditions), expected)


def test_sequential_offload(
    prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any, expected: torch.Tensor
) -> None:
    cpu_offload(prior, torch.device("cpu"), offload_buffers=True)
    assert prior.proj_in.weight.is_meta, "weights are there only while a layer runs"
    assert_same(cached_predictions(prior, x, conditions), expected)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(
    level: str,
    prior: CachedPriorTransformer,
    x: torch.Tensor,
    conditions: Any,
    expected: torch.Tensor,
    tmp_path: Path,
) -> None:
    prior.enable_group_offload(
        torch.device("cpu"), offload_type=level, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert_same(cached_predictions(prior, x, conditions), expected)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_graph_breaks(x: torch.Tensor, conditions: Any) -> None:
    stock = random_prior(num_layers=1)
    expected = stock_predictions(stock, x, conditions)
    compiled = torch.compile(adopt(stock), fullgraph=True, backend="eager")
    assert_same(cached_predictions(compiled, x, conditions), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_all_blocks_are_compiled_together_once_for_the_prefix_and_once_for_a_step(
    stock: PriorTransformer, x: torch.Tensor, conditions: Any, expected: torch.Tensor
) -> None:
    prior = adopt(stock)
    compiled: list[torch.fx.GraphModule] = []
    compile_blocks(prior, [prior], {"fullgraph": True, "backend": lambda graph, _: compiled.append(graph) or graph})
    for _ in range(2):
        assert_same(cached_predictions(prior, x, conditions), expected)
    assert len(compiled) == 2


def test_lora(x: torch.Tensor, conditions: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    stock = random_prior()
    prior = adopt(copy.deepcopy(stock))
    without = cached_predictions(prior, x, conditions)
    for model in (stock, prior):
        torch.manual_seed(6)
        model.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        )
    expected = stock_predictions(stock, x, conditions)
    assert (expected - without).abs().max() > 1e-2
    assert_same(cached_predictions(prior, x, conditions), expected)
    prior.disable_adapters()
    assert_same(cached_predictions(prior, x, conditions), without)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backend(
    backend: str, prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any, expected: torch.Tensor
) -> None:
    with attention_backend("native"):  # takes back that the choice becomes everybody's default
        prior.set_attention_backend(backend)
    assert {p._attention_backend.value for p in prior.attn_processors.values()} == {backend}
    assert_same(cached_predictions(prior, x, conditions), expected)


@pytest.mark.parametrize("wanted", ["encoder_hidden_states", "hidden_states"])
def test_gradients_flow_also_where_a_step_without_them_comes_between(
    wanted: str, prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any
) -> None:
    def gradient(*, cached: bool) -> torch.Tensor:
        inputs: dict[str, Any] = {name: value.clone() for name, value in conditions.items()}
        step = {"hidden_states": x.clone(), "timestep": 10}
        wanted_input = {**inputs, **step}[wanted].requires_grad_()
        if cached:
            with torch.set_grad_enabled(wanted in inputs):
                inputs = {"prefix": prior(prefill=True, **inputs)}
        prediction = prior(**step, **inputs).predicted_image_embedding
        with torch.no_grad():
            prior(**step, **inputs)
        (of_input,) = torch.autograd.grad(prediction.square().sum(), wanted_input)
        return of_input

    assert_same(gradient(cached=True), gradient(cached=False), 1e-5)


# ------------------------------------------------------------------------------------------------ loading


def test_loads_from_a_stock_folder(
    stock: PriorTransformer, x: torch.Tensor, conditions: Any, expected: torch.Tensor, tmp_path: Path
) -> None:
    stock.save_pretrained(tmp_path)
    prior = CachedPriorTransformer.from_pretrained(tmp_path)
    assert prior.config.num_layers == SIZES["num_layers"]
    assert_same(cached_predictions(prior, x, conditions), expected)


def test_is_built_like_the_stock_class() -> None:
    prior = CachedPriorTransformer(**SIZES)
    assert dict(prior.config).items() >= SIZES.items()
    assert prior.supports_prefix
    again = CachedPriorTransformer.from_config(prior.config)
    assert again.config.num_embeddings == SIZES["num_embeddings"]


# ------------------------------------------------------------------------------------------------ where it cannot


def test_a_prior_without_tokens_after_the_text_has_no_prefix() -> None:
    shape_prior = adopt(random_prior(additional_embeddings=0, added_emb_type=None))
    assert not shape_prior.supports_prefix
    with pytest.raises(ValueError, match="supports_prefix"):
        shape_prior(prefill=True, **random_conditions(shape_prior))


def test_foreign_attention_processors_mean_no_prefix(prior: CachedPriorTransformer) -> None:
    prior.set_attn_processor(AttnProcessor2_0())
    assert not prior.supports_prefix
    prior.set_default_attn_processor()
    assert prior.supports_prefix


def test_refuses_what_makes_no_sense(prior: CachedPriorTransformer, x: torch.Tensor, conditions: Any) -> None:
    prefix = prior(prefill=True, **conditions)
    assert isinstance(prefix, PriorPrefix)
    with pytest.raises(ValueError, match="needed: attention_mask"):
        prior(prefill=True, **{**conditions, "attention_mask": None})
    with pytest.raises(ValueError, match="no meaning: hidden_states"):
        prior(x, prefill=True, **conditions)
    with pytest.raises(ValueError, match="needed: timestep"):
        prior(x, prefix=prefix)
    with pytest.raises(ValueError, match="no meaning: attention_mask"):
        prior(x, 1, prefix=prefix, attention_mask=conditions["attention_mask"])
    with pytest.raises(ValueError, match="batch of 2; accepted is the prefix's, 3"):
        prior(x[:2], 1, prefix=prefix)
    with pytest.raises(ValueError, match="7 text tokens"):
        prior(prefill=True, **{**conditions, "attention_mask": conditions["attention_mask"][:, :5]})
    with pytest.raises(ValueError, match="one batch"):
        prior(prefill=True, **{**conditions, "proj_embedding": conditions["proj_embedding"][:1]})
    with pytest.raises(ValueError, match="needed: proj_embedding"):
        prior(x, 1)
