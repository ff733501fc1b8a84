"""GPT models of Megatron-Core, saved as Megatron-LM saves them, as checkpoints to train: the same logits."""

from __future__ import annotations

import argparse
import enum
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mesh_megatron.checkpoint.reader import CheckpointReader
from mesh_megatron.checkpoint.safe_unpickling import SafeReader
from mesh_megatron.hf.import_options import Given, ImportOptions
from mesh_megatron.hf.importing import write_import
from mesh_megatron.hf.megatron_model import MegatronModel

pytestmark = pytest.mark.usefixtures("one_rank")
ROOT = Path(__file__).parents[3]
VOCABULARY, LENGTH = 96, 16
LLAMA = {
    "normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False,
    "num_query_groups": 2, "ffn_hidden_size": 80,
}  # fmt: skip


class Backend(enum.Enum):
    """A class that an importing program does not know, as some of Megatron-LM's arguments are of."""

    AUTO = 1


def gpt(own_norm_names: bool = False, tied: bool = False, positions: str = "rope", rotary=None, **changes):
    """A small random GPTModel; ``own_norm_names`` saves norms under their own names, not the fused layers'."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(0)
    options = {
        "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "bias_activation_fusion": False,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True, "init_method_std": 0.1,
    }  # fmt: skip
    config = TransformerConfig(**{**options, **changes})
    spec = get_gpt_layer_local_spec(
        normalization=config.normalization, num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )
    if own_norm_names:
        spec.submodules.sharded_state_dict_keys_map = {}
    model = GPTModel(
        config,
        spec,
        VOCABULARY,
        LENGTH,
        position_embedding_type=positions,
        share_embeddings_and_output_weights=tied,
        **(rotary or {}),
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero and norms at one, where mistakes cannot show
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def arguments(config, **changes):
    """The arguments that Megatron-LM would store for the model of ``config``, those that matter and some others."""
    options = {
        "num_attention_heads": config.num_attention_heads, "rotary_base": 10000, "rotary_percent": 1.0,
        "norm_epsilon": config.layernorm_epsilon, "seq_length": LENGTH, "max_position_embeddings": LENGTH,
        "position_embedding_type": "rope", "qk_layernorm": False, "bias_gelu_fusion": False, "window_size": None,
        "attention_backend": Backend.AUTO, "params_dtype": torch.bfloat16, "betas": [0.9, 0.95],
    }  # fmt: skip
    return argparse.Namespace(**{**options, **changes})


def save(model, folder, args=None, stacked=True, halves=False):
    """Save ``model`` as Megatron-LM does; with ``halves`` as its fully sharded runs do."""
    from megatron.core import dist_checkpointing, parallel_state

    metadata = {
        "non_homogeneous_layers": not stacked,
        "singleton_local_shards": halves,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    folder.mkdir(parents=True)
    state = {"model": model.sharded_state_dict(metadata=metadata), "checkpoint_version": 3.0, "iteration": 10}
    if args is not None:
        state["args"] = args
    dist_checkpointing.save(state, str(folder))
    return folder


def import_(folder, output, **options):
    source = MegatronModel(folder, given=options.pop("given", None))
    write_import(source, ImportOptions(output=output, **options))
    return source


def ours(save_folder):
    """The trainer's model with the weights of an import, loaded as training loads them."""
    from mesh_megatron.checkpoint.megatron_reader import open_checkpoint, read_sharded, without_missing_scales
    from mesh_megatron.model.layer import layer_specs
    from mesh_megatron.model.mesh_model import MeshModel
    from mesh_megatron.model.transformer_config import transformer_config

    folder = CheckpointReader(save_folder).folder
    config = CheckpointReader(save_folder).config.model
    model = MeshModel(config, transformer_config(config), config.padded_vocab_size, layer_specs(config))
    reader = open_checkpoint(folder)
    keys = set(reader.index.state_dict_metadata)
    request = without_missing_scales({"model": model.sharded_state_dict()}, keys)
    model.load_state_dict(read_sharded(request, folder, reader)["model"], strict=False)
    return model.eval()


@torch.no_grad()
def assert_same_logits(theirs, mine):
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).expand(2, -1)
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    expected = theirs(tokens, positions, mask)
    assert expected.std() > 0.1
    torch.testing.assert_close(mine(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rotary", "stored"),
    [
        (
            {"rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000},
            {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000},
        ),
        ({"seq_len_interpolation_factor": 4}, {"rotary_seq_len_interpolation_factor": 4}),
    ],
    ids=["llama3", "interpolation"],
)
def test_scaled_frequencies(tmp_path, rotary, stored):
    theirs = gpt(rotary=rotary)
    import_(save(theirs, tmp_path / "theirs", arguments(theirs.config, **stored)), tmp_path / "ours")
    mine = ours(tmp_path / "ours")
    assert_same_logits(theirs, mine)
    for position in (100, 100000):
        expected = theirs.rotary_pos_emb.get_emb(1, position)
        torch.testing.assert_close(mine.rotary.get_emb(1, position), expected, rtol=1e-6, atol=0)


def test_dropout_goes_on(tmp_path):
    theirs = gpt()
    rates = {"hidden_dropout": 0.1, "attention_dropout": 0.2}
    model = MegatronModel(save(theirs, tmp_path / "theirs", arguments(theirs.config, **rates))).model
    assert (model.hidden_dropout, model.attention_dropout) == (0.1, 0.2)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per layer"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True},
        {"add_bias_linear": False},
        {"add_bias_linear": False, "add_qkv_bias": True},
        {"qk_layernorm": True},
        {"qk_layernorm": True, **LLAMA},
        {"own_norm_names": True},
        LLAMA,
        LLAMA | {"tied": True, "own_norm_names": True},
        LLAMA | {"normalization": "LayerNorm", "add_bias_linear": True, "kv_channels": 16},
    ],
    ids=[
        "GPT",
        "tied",
        "no biases",
        "biases of queries",
        "norms of heads",
        "Llama, norms of heads",
        "norms by name",
        "Llama",
        "Llama, tied, norms by name",
        "SwiGLU with biases",
    ],
)
def test_the_same_logits(tmp_path, changes, stacked):
    theirs = gpt(**changes)
    folder = save(theirs, tmp_path / "theirs" / "iter_0000010", arguments(theirs.config), stacked)
    import_(folder, tmp_path / "ours")
    assert_same_logits(theirs, ours(tmp_path / "ours"))


def test_gate_and_value_saved_apart(tmp_path):
    theirs = gpt(**LLAMA)
    folder = save(theirs, tmp_path / "theirs", arguments(theirs.config), stacked=False, halves=True)
    assert "decoder.layers.0.mlp.linear_fc1.weight_v" in SafeReader(folder).index.state_dict_metadata
    import_(folder, tmp_path / "ours")
    assert_same_logits(theirs, ours(tmp_path / "ours"))


def test_flags_stand_in_for_arguments_that_are_not_stored(tmp_path):
    theirs = gpt()
    folder = save(theirs, tmp_path / "theirs")
    with pytest.raises(ValueError, match="stores no arguments.*--num-attention-heads"):
        MegatronModel(folder)
    with pytest.raises(ValueError, match="--num-attention-heads 5 does not fit"):
        MegatronModel(folder, given=Given(num_attention_heads=5))
    import_(folder, tmp_path / "ours", given=Given(num_attention_heads=4, seq_length=LENGTH))
    assert_same_logits(theirs, ours(tmp_path / "ours"))


def test_settings_come_from_the_arguments(tmp_path):
    theirs = gpt(layernorm_epsilon=1e-3)
    args = arguments(theirs.config, rotary_base=500000, rotary_percent=0.5, bias_gelu_fusion=True)
    source = import_(save(theirs, tmp_path / "theirs", args), tmp_path / "ours")
    model = CheckpointReader(tmp_path / "ours").config.model
    assert (model.rotary_base, model.rotary_percent, model.norm_epsilon, model.seq_length) == (
        500000,
        0.5,
        1e-3,
        LENGTH,
    )
    assert (model.layout, model.recurrence, model.padded_vocab_size) == ("4", "vanilla", VOCABULARY)
    assert "tanh approximation" in source.notes[0]


def test_it_becomes_recursive(tmp_path):
    theirs = gpt(num_layers=6, **LLAMA)
    folder = save(theirs, tmp_path / "theirs", arguments(theirs.config))
    import_(folder, tmp_path / "ours", layout="1+2R2+1", init="average")
    made = CheckpointReader(tmp_path / "ours")
    layers = [layer.mlp.linear_fc1.weight for layer in theirs.decoder.layers]
    expected = {"prelude.layers.0": layers[0], "core.layers.1": (layers[2] + layers[4]) / 2, "coda.layers.0": layers[5]}
    for layer, weight in expected.items():
        key = f"{layer}.mlp.linear_fc1.weight"
        torch.testing.assert_close(made.read([key])[key], weight.detach())
    assert ours(tmp_path / "ours").model.recurrence == "mesh"


@pytest.mark.parametrize(
    ("changes", "args", "complaint"),
    [
        ({"positions": "learned_absolute"}, {}, "position_embeddings.weight is of learned positions"),
        ({"num_moe_experts": 2}, {}, r"is of a mixture of experts \(--num-experts\)"),
        ({}, {"position_embedding_type": "none"}, "--position-embedding-type none.*only rope"),
        ({}, {"squared_relu": True}, "--squared-relu True"),
        ({}, {"window_size": (128, 0)}, r"--window-size \(128, 0\)"),
    ],
)  # fmt: skip
def test_what_has_no_equal_here_is_refused_by_name(tmp_path, changes, args, complaint):
    theirs = gpt(**changes)
    folder = save(theirs, tmp_path / "theirs", arguments(theirs.config, **args))
    with pytest.raises(ValueError, match=complaint):
        MegatronModel(folder)


def test_other_formats_and_missing_layers(tmp_path):
    (tmp_path / "old" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match="no checkpoint there"):
        MegatronModel(tmp_path / "old")
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "old" / "iter_0000003").mkdir()
    with pytest.raises(ValueError, match="not in the format torch_dist.*--ckpt-convert-format torch_dist"):
        MegatronModel(tmp_path / "old")
    theirs = gpt()
    import_(save(theirs, tmp_path / "theirs", arguments(theirs.config)), tmp_path / "ours")
    with pytest.raises(ValueError, match="is a checkpoint of this project"):
        MegatronModel(tmp_path / "ours")
    del theirs.decoder.layers[1]
    args = arguments(theirs.config)
    with pytest.raises(ValueError, match=r"missing decoder.layers.\d.self_attention"):
        MegatronModel(save(theirs, tmp_path / "cut", args, stacked=False))


def test_damaged_arguments_and_tensors_are_named(tmp_path):
    theirs = gpt()
    folder = save(theirs, tmp_path / "theirs", arguments(theirs.config))
    if (folder / "common.pt").exists():  # newer versions of Megatron-Core keep it among the tensors
        (folder / "common.pt").write_bytes(b"junk")
        with pytest.raises(ValueError, match="common.pt: its arguments cannot be read"):
            MegatronModel(folder)
        (folder / "common.pt").unlink()
    source = MegatronModel(folder, given=Given(num_attention_heads=4))
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="distcp cannot be read"):
        source.read("embedding.word_embeddings.weight")


def test_the_commands_import_and_train_a_step(tmp_path):
    theirs = gpt(**LLAMA)
    save(theirs, tmp_path / "theirs" / "iter_0000010", arguments(theirs.config))
    (tmp_path / "theirs/latest_checkpointed_iteration.txt").write_text("10")
    command("tools/import_megatron.py", "--load", tmp_path / "theirs", "--output", tmp_path / "ours")
    command(
        "pretrain_mesh.py", "--config", tmp_path / "ours/model.yaml", "--load", tmp_path / "ours",
        "--save", tmp_path / "tuned", "--mock-data", "--micro-batch-size", 2, "--global-batch-size", 2,
        "--train-iters", 1, "--eval-iters", 0, "--lr", 1e-3, "--num-workers", 0,
    )  # fmt: skip
    before, after = (CheckpointReader(tmp_path / name) for name in ("ours", "tuned"))
    assert (before.resolved["iteration"], after.resolved["iteration"]) == (0, 1)
    key = "coda.layers.1.mlp.linear_fc2.weight"
    change = (after.read([key])[key] - before.read([key])[key]).abs().max()
    assert 0 < change < 0.01  # Adam moves a weight by about the learning rate
    done = command("tools/import_megatron.py", "--load", tmp_path / "theirs", "--output", tmp_path / "ours", fails=True)
    assert done.stderr.startswith("import_megatron.py: error: --output") and "add --force" in done.stderr


def command(*words, fails=False):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 2) if fails else (done.returncode == 0), done.stderr[-3000:]
    return done


class Harmful:
    """An argument that runs a command if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["MADE_BY_PICKLE"],)


def test_no_code_from_the_arguments_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MADE_BY_PICKLE", str(tmp_path / "made"))
    theirs = gpt()
    folder = save(theirs, tmp_path / "theirs", arguments(theirs.config, tokenizer=Harmful()))
    import_(folder, tmp_path / "ours")
    assert not (tmp_path / "made").exists()
