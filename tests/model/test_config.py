"""Configs as they lie in the wild are read; what cannot be served is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ARCHITECTURES, InvalidConfig, ModelConfig, UnsupportedModel
from model.rope_config import RopeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def read(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    config = {key: value for key, value in (LLAMA | changes).items() if value is not ...}
    return ModelConfig.from_huggingface(config, generation)


# --------------------------------------------------------------------------- what is read


def test_absent_keys_mean_what_they_mean_to_transformers() -> None:
    config = read()
    assert (config.num_kv_heads, config.head_size) == (4, 16)
    assert config.rope == RopeConfig("none", 10_000.0)
    assert (config.norm_eps, config.max_positions, config.dtype) == (1e-6, 256, "float32")
    biases = (config.qkv_bias, config.output_bias, config.mlp_bias)
    assert not any((config.tie_embeddings, *biases))
    assert config.windows == (None, None, None)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_null_keys_count_as_absent() -> None:
    nulls = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_scaling", "hidden_act"))
    assert read(**nulls, tie_word_embeddings=None) == read()


def test_head_dim_need_not_be_hidden_by_heads() -> None:
    assert read(head_dim=32, num_attention_heads=3, num_key_value_heads=1).head_size == 32


@pytest.mark.parametrize("name", ["LLaMAForCausalLM", "LlamaForCausalLM"])
def test_old_spelling_of_the_architecture_is_read(name: str) -> None:
    assert read(architectures=[name]).architecture == "LlamaForCausalLM"


def test_model_type_stands_in_for_the_architecture() -> None:
    assert read(architectures=None, model_type="qwen3").architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("pretraining_tp", [1, 2, 8])
def test_slices_of_the_pretraining_are_tolerated(pretraining_tp: int) -> None:
    assert read(pretraining_tp=pretraining_tp) == read()


def test_end_tokens_are_those_of_both_files() -> None:
    config = read({"eos_token_id": [7, 9, 8]}, eos_token_id=8)
    assert config.eos_token_ids == (8, 7, 9)
    assert read({"eos_token_id": 5}).eos_token_ids == (5,)
    assert read(eos_token_id=None, bos_token_id=None).eos_token_ids == ()
    assert read(eos_token_id=None, bos_token_id=None).bos_token_id is None


def test_special_tokens_outside_the_vocabulary_are_dropped() -> None:
    config = read(eos_token_id=[128, 3, -1], bos_token_id=-1)
    assert (config.eos_token_ids, config.bos_token_id) == ((3,), None)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
def test_dtype_is_read_from_either_key(key: str, value: str) -> None:
    assert read(**{key: value}).dtype == "bfloat16"


# --------------------------------------------------------------------------- families


def test_qwen_2_has_biases_and_qwen_3_norms() -> None:
    qwen2, qwen3 = (read(architectures=[f"Qwen{n}ForCausalLM"], head_dim=16) for n in (2, 3))
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm) == (False, False, True)


def test_llama_biases_follow_their_keys() -> None:
    config = read(attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(("stated", "window"), [(..., 4096), (None, None), (32, 32)])
def test_mistral_slides_in_all_layers(stated: Any, window: int | None) -> None:
    config = read(architectures=["MistralForCausalLM"], sliding_window=stated)
    assert config.windows == (window,) * 3


def test_llama_has_no_window() -> None:
    assert read(sliding_window=32).windows == (None, None, None)


@pytest.mark.parametrize("number", [2, 3])
def test_qwen_slides_only_when_told_to(number: int) -> None:
    keys = {"architectures": [f"Qwen{number}ForCausalLM"], "sliding_window": 32}
    assert read(**keys, max_window_layers=1).windows == (None, None, None)
    slides = keys | {"use_sliding_window": True}
    assert read(**slides, max_window_layers=1).windows == (None, 32, 32)
    assert read(**slides).windows == (None, None, None)  # from layer 28 on
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read(**slides, layer_types=types).windows == (32, None, 32)
    assert read(**keys, layer_types=types).windows == (None, None, None)


# --------------------------------------------------------------------------- rotary settings

YARN = {"factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("kind_key", ["type", "rope_type"])
@pytest.mark.parametrize("table_key", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_rotary_scaling_are_read(kind_key: str, table_key: str) -> None:
    config = read(rope_theta=5e5, **{table_key: {kind_key: "linear", "factor": 2.0}})
    assert config.rope == RopeConfig("linear", 5e5, 2.0)


def test_theta_inside_rope_parameters_wins() -> None:
    config = read(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert config.rope == RopeConfig("none", 1e6)


def test_yarn_reaches_its_factor_times_the_original_context() -> None:
    config = read(rope_scaling={"type": "yarn", **YARN})
    assert config.max_positions == 512
    assert config.rope.attention_factor == pytest.approx(1.1386, abs=1e-4)
    assert read(rope_scaling={"type": "yarn", "factor": 4.0}).max_positions == 256


def test_yarn_without_a_factor_takes_the_ratio_of_contexts() -> None:
    config = read(rope_scaling={"rope_type": "yarn", **YARN, "factor": None})
    assert config.rope.factor == 2.0


def test_dynamic_reaches_its_factor_times_the_context() -> None:
    assert read(rope_scaling={"type": "dynamic", "factor": 3.0}).max_positions == 768


def test_original_context_beside_the_table_wins() -> None:
    config = read(rope_scaling={"type": "yarn", **YARN}, original_max_position_embeddings=64)
    assert config.rope.original_positions == 64


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name",
    [
        "MixtralForCausalLM",
        "Llama4ForConditionalGeneration",
        "MllamaForConditionalGeneration",
        "Gemma3ForCausalLM",
        "Phi3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "LlamaForSequenceClassification",
    ],
)
def test_foreign_architectures_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read(architectures=[name])
    assert name in str(caught.value)
    assert all(known in str(caught.value) for known in ARCHITECTURES)


def test_a_foreign_model_type_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="model type gpt2"):
        read(architectures=None, model_type="gpt2")


def test_experts_under_a_known_name_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="mixtures of experts"):
        read(num_local_experts=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": ...}, "no hidden_size"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"intermediate_size": 96.0}, "intermediate_size is 96.0"),
        ({"num_key_value_heads": 3}, "cannot share 3 key heads"),
        ({"num_key_value_heads": 8}, "cannot share 8 key heads"),
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
        ({"head_dim": 15}, "heads are 15 wide"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "'su' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "no factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "no low_freq_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e9}}, "factor is 1000000000.0"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {}}}, "differ from layer to layer"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
         | {"layer_types": ["full_attention"]}, "does not name 3 layers"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
         | {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
         | {"layer_types": [["full_attention"]] * 3}, "layer_types names"),
    ],
)  # fmt: skip
def test_odd_values_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [[], None, "llama", 3])
def test_a_config_that_is_no_table_is_refused(config: Any) -> None:
    with pytest.raises(InvalidConfig, match="not a table"):
        ModelConfig.from_huggingface(config)


_KEYS = [
    *LLAMA,
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "layer_types"),
    *("max_window_layers", "eos_token_id", "torch_dtype", "tie_word_embeddings", "mlp_bias"),
]
_SCALING_KEYS = [
    *("type", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "rope_theta"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    "original_max_position_embeddings",
]
_NAMES = st.sampled_from([*ARCHITECTURES, "linear", "dynamic", "yarn", "llama3", "silu"])
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | _NAMES
_VALUES = (
    _SCALARS
    | st.lists(_SCALARS, max_size=3)
    | st.dictionaries(st.sampled_from(_SCALING_KEYS), _SCALARS, max_size=8)
)


@settings(max_examples=400, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=5))
def test_any_value_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        read(**changes)
    except ValueError as error:
        assert str(error)  # noqa: PT017 whether it is refused depends on the value


def test_real_configs_are_read(shared_dir: Path) -> None:
    found = sorted(shared_dir.glob("models/**/config.json"))
    assert found
    for path in found:
        config = json.loads(path.read_text())
        if "hidden_size" in config:
            assert ModelConfig.from_huggingface(config).vocab_size == config["vocab_size"]
