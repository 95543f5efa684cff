"""Planning accounts for every key on both sides, reports all faults at once, and runs backwards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_diffusers.conversion.errors import ConversionError
from kandinsky_diffusers.conversion.matching import match
from kandinsky_diffusers.conversion.rules import Constant, Drop, RuleTable, Template, join, rename, split
from kandinsky_diffusers.conversion.transforms import Concat, SplitHeads, Squeeze


TABLE = RuleTable(
    rules=(
        rename("{block}.norm.{p}", "{block}.group_norm.{p}"),
        split("{block}.qkv.weight", tuple(f"{{block}}.to_{n}.weight" for n in "qkv"), Squeeze(), SplitHeads(2)),
        rename("text.{layer}.{rest}", "text_model.layers.{layer}.{rest}", optional=True),
    ),
    drops=(Drop("position_ids", "computed"),),
    paths={"block": {"in.1": "down.0", "in.2": "down.1"}},
)
SHAPES = {
    "in.1.norm.weight": (4,),
    "in.1.norm.bias": (4,),
    "in.1.qkv.weight": (12, 4, 1),
    "in.2.norm.weight": (4,),
    "in.2.norm.bias": (4,),
    "position_ids": (1, 7),
}
EXPECTED = {
    "down.0.group_norm.weight": (4,),
    "down.0.group_norm.bias": (4,),
    "down.0.to_q.weight": (4, 4),
    "down.0.to_k.weight": (4, 4),
    "down.0.to_v.weight": (4, 4),
    "down.1.group_norm.weight": (4,),
    "down.1.group_norm.bias": (4,),
}


def faults(**changes) -> str:
    arguments = {"table": TABLE, "shapes": SHAPES, "expected": EXPECTED, **changes}
    with pytest.raises(ConversionError) as caught:
        match(**arguments)
    return str(caught.value)


def test_a_complete_file_gives_every_tensor_of_the_model():
    plan = match(TABLE, SHAPES, EXPECTED)
    assert plan.target_shapes == EXPECTED
    assert plan.dropped == {"position_ids": "computed"}


def test_the_same_table_runs_backwards():
    plan = match(TABLE, SHAPES, EXPECTED)
    assert plan.inverse.target_shapes == {k: s for k, s in SHAPES.items() if k != "position_ids"}


def test_an_unknown_key_is_named_and_can_be_dropped():
    shapes = {**SHAPES, "ema.decay": ()}
    message = faults(shapes=shapes)
    assert "ema.decay" in message
    assert "--drop" in message
    assert match(TABLE, shapes, EXPECTED, drop=["ema.*"]).dropped["ema.decay"] == "left out with --drop"


def test_dropping_a_needed_key_is_a_fault():
    assert "in.1.norm.bias" in faults(drop=["in.1.norm.bias"])


def test_a_missing_key_is_named_as_the_original_names_it():
    shapes = {k: s for k, s in SHAPES.items() if k != "in.2.norm.bias"}
    message = faults(shapes=shapes)
    assert "in.2.norm.bias" in message
    assert "down.1.group_norm.bias" in message


def test_a_shape_that_differs_from_the_models_is_named_with_both_shapes():
    message = faults(shapes={**SHAPES, "in.2.norm.bias": (5,)})
    assert "in.2.norm.bias" in message
    assert "[5]" in message
    assert "[4]" in message


def test_a_shape_that_a_transform_refuses_is_named():
    assert "in.1.qkv.weight" in faults(shapes={**SHAPES, "in.1.qkv.weight": (13, 4, 1)})


def test_two_keys_that_make_the_same_tensor_are_a_fault():
    table = RuleTable((rename("a", "x"), rename("b", "x")))
    message = faults(table=table, shapes={"a": (1,), "b": (1,)}, expected={"x": (1,)})
    assert "made twice" in message


def test_a_key_that_two_rules_match_is_a_fault():
    table = RuleTable((rename("a.{rest}", "x.{rest}"), rename("a.b", "y")))
    assert "several rules" in faults(table=table, shapes={"a.b": (1,)}, expected={"y": (1,)})


def test_a_rule_for_the_rest_takes_what_nothing_else_takes_and_runs_backwards():
    old = rename("{a}.query.{p}", "{a}.to_q.{p}", optional=True)
    table = RuleTable((rename("{rest}", "{rest}"), old), drops=(Drop("position_ids", "computed"),))
    expected = {"0.to_q.bias": (1,), "0.norm.bias": (1,)}
    for name in ("query", "to_q"):
        shapes = {f"0.{name}.bias": (1,), "0.norm.bias": (1,), "position_ids": (1,)}
        plan = match(table, shapes, expected)
        assert list(plan.dropped) == ["position_ids"]
        assert plan.target_shapes == expected
        assert plan.inverse.target_shapes.keys() == shapes.keys() - {"position_ids"}
    assert "--drop" in faults(table=table, shapes={**expected, "surplus": (1,)}, expected=expected)


def test_a_rule_that_matches_nothing_is_a_fault_unless_optional():
    table = RuleTable((rename("a", "x"), rename("b", "y")))
    assert "    b" in faults(table=table, shapes={"a": (1,)}, expected={"x": (1,)})


def test_a_tensor_that_the_model_does_not_have_is_a_fault():
    assert "down.1.group_norm.bias" in faults(
        expected={k: s for k, s in EXPECTED.items() if "1.group_norm.b" not in k}
    )


def test_all_faults_are_reported_together():
    shapes = {**SHAPES, "surplus": (1,), "in.1.norm.weight": (9,)}
    del shapes["in.2.norm.bias"]
    message = faults(shapes=shapes)
    assert all(key in message for key in ("surplus", "in.1.norm.weight", "in.2.norm.bias"))


def test_many_faults_of_one_form_do_not_hide_another():
    shapes = {**SHAPES, **{f"extra.{i}.weight": (1,) for i in range(500)}, "other": (1,)}
    message = faults(shapes=shapes)
    assert "other" in message
    assert len(message.splitlines()) < 30


def test_keys_of_another_model_are_left_to_it():
    table = RuleTable((rename("text.{rest}", "text.{rest}"),), elsewhere=("image.{rest}",))
    plan = match(table, {"text.a": (1,), "image.b": (2,)}, {"text.a": (1,)})
    assert plan.elsewhere == ("image.b",)
    assert not plan.dropped


def test_several_tensors_can_become_one_and_all_are_needed():
    table = RuleTable((join(("{i}.k", "{i}.v"), "{i}.kv", Concat(2)),))
    plan = match(table, {"0.k": (2, 3), "0.v": (2, 3)}, {"0.kv": (4, 3)})
    assert plan.inverse.target_shapes == {"0.k": (2, 3), "0.v": (2, 3)}
    assert "0.k" in faults(table=table, shapes={"0.k": (2, 3)}, expected={"0.kv": (4, 3)})


def test_a_constant_takes_the_models_shape_and_has_no_way_back():
    table = RuleTable((rename("a", "x"),), constants=(Constant("scale", 0.5, "kept in code"),))
    plan = match(table, {"a": (1,)}, {"x": (1,), "scale": (3,)})
    assert plan.target_shapes["scale"] == (3,)
    assert plan.inverse.target_shapes == {"a": (1,)}


def test_a_path_that_leads_to_one_place_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        RuleTable((), paths={"block": {"a": "x", "b": "x"}})


@given(block=st.sampled_from(["in.1", "in.2"]), number=st.integers(0, 999), leaf=st.sampled_from(["weight", "bias"]))
def test_a_template_reads_what_its_counterpart_wrote(block, number, leaf):
    source = Template("{block}.layer.{n}.{p}", TABLE.paths)
    target = Template("{block}.blocks.{n}.{p}", TABLE.inverse.paths)
    key = f"{block}.layer.{number}.{leaf}"
    written = source.fill(target.text, source.match(key) or {})
    assert target.fill(source.text, target.match(written) or {}) == key


@pytest.mark.parametrize("key", ["in.3.norm.weight", "in.1.norm.scale", "xin.1.norm.weight", "in.1.norm.weight.x"])
def test_a_template_matches_whole_keys_only(key):
    assert Template("{block}.norm.{p}", TABLE.paths).match(key) is None
