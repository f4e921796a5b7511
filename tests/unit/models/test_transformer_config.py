"""What megatron-core is told about the two stacks."""

import pytest
import torch

from mmlm.config.presets import internvl_chat_v1_2, tiny
from mmlm.models.transformer_config import make_transformer_configs, padded_vocab_size
from mmlm.parallel.stage_plan import make_stage_plan


@pytest.mark.parametrize(
    ("vocab", "tp_size", "padded"),
    [(300, 1, 320), (300, 2, 384), (64009, 4, 64256), (64009, 8, 64512), (512, 8, 512)],
)
def test_padded_vocabulary(vocab: int, tp_size: int, padded: int) -> None:
    assert padded_vocab_size(vocab, tp_size) == padded


def test_published_sizes_at_tp_4() -> None:
    model = internvl_chat_v1_2()
    configs = make_transformer_configs(
        model, make_stage_plan(model, 1), tp_size=4, pp_size=1, dtype=torch.bfloat16
    )
    vision, language = configs.vision, configs.language
    assert (vision.num_attention_heads, vision.num_query_groups) == (28, 28)  # 25 and padding
    assert (vision.hidden_size, vision.kv_channels, vision.num_layers) == (3200, 128, 45)
    assert (vision.add_bias_linear, vision.gated_linear_unit) == (True, False)
    assert vision.layernorm_epsilon == 1e-6 and language.layernorm_epsilon == 1e-5
    assert (language.num_attention_heads, language.num_query_groups) == (56, 8)
    assert (language.add_bias_linear, language.gated_linear_unit) == (False, True)
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(vision.activation_func(x), x * (1 + torch.erf(x / 2**0.5)) / 2)
    torch.testing.assert_close(language.activation_func(x), x / (1 + torch.exp(-x)))
    for config in (vision, language):
        assert config.bf16 and config.params_dtype == config.pipeline_dtype == torch.bfloat16
        assert config.variable_seq_lengths
        assert config.attention_dropout == config.hidden_dropout == 0.0
        assert config.pipeline_model_parallel_layout is None


def test_both_stacks_get_their_part_of_the_layout() -> None:
    plan = make_stage_plan(tiny(), 2, "vvvpEt|ttL")
    configs = make_transformer_configs(tiny(), plan, tp_size=1, pp_size=2, dtype=torch.float32)
    counts = [
        [
            [str(layer).split(".")[-1] for layer in stage].count("decoder")
            for (stage,) in config.pipeline_model_parallel_layout.layout
        ]
        for config in (configs.vision, configs.language)
    ]
    assert counts == [[3, 0], [1, 2]]
    assert not configs.vision.bf16


def test_virtual_stages_never_batch_their_exchanges() -> None:
    """At PP 2 both neighbours are one rank, and batched exchanges would mix up silently."""
    model = tiny()
    configs = make_transformer_configs(
        model,
        make_stage_plan(model, 4),
        tp_size=1,
        pp_size=2,
        vpp_size=2,
        dtype=torch.float32,
    )
    for config in (configs.vision, configs.language):
        assert config.virtual_pipeline_model_parallel_size == 2
        assert config.overlap_p2p_comm is True
        assert config.batch_p2p_comm is False


def test_recompute_is_chosen_for_each_tower() -> None:
    model = tiny()
    configs = make_transformer_configs(
        model,
        make_stage_plan(model, 1),
        tp_size=1,
        pp_size=1,
        dtype=torch.float32,
        recompute_vision="full",
        recompute_language="selective",
    )
    assert configs.vision.recompute_granularity == "full"
    assert (configs.vision.recompute_method, configs.vision.recompute_num_layers) == ("uniform", 1)
    assert configs.language.recompute_granularity == "selective"
    assert configs.language.recompute_modules == ["core_attn"]
