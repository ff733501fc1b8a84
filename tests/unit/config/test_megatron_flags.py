"""Command lines of Megatron-LM: every flag of its arguments.py is a setting, accepted, or refused with a reason."""

import json
from pathlib import Path

import pytest
from test_cli import run
from update_megatron_page import OURS, PAGE, THEIRS, canonical, kind, page

from mesh_megatron.commands.pretrain import main
from mesh_megatron.config.megatron_flags import refusal, translate
from mesh_megatron.config.megatron_table import ACCEPTED, ANY, REFUSED, REFUSED_VALUES, RENAMED

EXAMPLES = (Path(__file__).with_name("megatron_examples.txt")).read_text().split("\n# ")


def refused(*words: str, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_every_flag_of_theirs_has_a_place():
    unknown = [flag for flag in THEIRS if kind(flag) == "unknown"]
    assert not unknown
    assert {kind(flag) for flag in THEIRS} == {"same", "renamed", "accepted", "refused"}


def test_the_tables_hold_only_flags_of_theirs_and_none_of_ours():
    names = {canonical(flag) for flag in THEIRS}
    assert ACCEPTED.keys() | RENAMED.keys() <= names
    assert not (ACCEPTED.keys() | RENAMED.keys()) & OURS
    assert not [flag for flag in OURS if refusal(flag)]


def test_a_mistyped_flag_of_ours_is_not_taken_for_one_of_theirs():
    for flag in OURS:
        for typo in (flag[:-1], flag + "s", flag[:4] + flag[5:]):
            assert typo in THEIRS or refusal(typo) is None, typo


def test_the_page_is_written_from_the_code():
    text = PAGE.read_text()
    assert text == page(), "python tests/unit/config/update_megatron_page.py --write"
    assert all(f"`{flag}" in text or f"`{canonical(flag)}" in text for flag in THEIRS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[0].removeprefix("# "))
def test_every_flag_of_an_example_is_taken_or_refused_with_a_reason(example):
    for line in example.splitlines()[1:]:
        flag, *values = line.split()
        try:
            kept = translate([flag, *values])
        except ValueError as error:
            assert str(error).startswith(f"{flag} " if values else f"{flag}:")
            assert "; use " in str(error) or "; it takes " in str(error)
        else:
            assert not kept or kept[0] in OURS, f"{flag} is neither taken nor refused"


def test_the_script_of_llama_is_taken_as_it_is(tmp_path, monkeypatch, capsys):
    """Word for word, as its arrays give them to torchrun: with the quotes around --split."""
    monkeypatch.chdir(tmp_path)
    (example,) = [text for text in EXAMPLES if text.startswith("llama/")]
    mock_data = example.split("--data-path")[0] + example.split("--tokenizer-model VALUE")[1]
    sizes = {"num-layers": 32, "seq-length": 8192, "max-position-embeddings": 8192, "global-batch-size": 128}
    for name, size in sizes.items():
        mock_data = mock_data.replace(f"--{name} VALUE", f"--{name} {size}")
    words = mock_data.replace("-size VALUE", "-size 1").replace("VALUE", "folder").split()[1:]
    recursion = "--layout 8+16R2+8 --recurrence mesh --dry-run --world-size 8"
    assert main([*words, *recursion.split()]) == 0
    assert "batch             128 sequences" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ACCEPTED)
def test_accepted_flags_leave_no_trace_and_take_no_other_values(flag):
    permitted = ACCEPTED[flag][0]
    for value in ["7"] if permitted == ANY else permitted.split() or [""]:
        assert translate(["--bf16", flag, *value.split(), "--lr", "1"]) == ["--bf16", "--lr", "1"]
    if permitted != ANY:
        with pytest.raises(ValueError, match=f"^{flag} nonsense: .*; it takes "):
            translate([flag, "nonsense"])


def test_a_run_names_what_cannot_make_it_faster(capsys):
    flags = "--tp-comm-overlap --use-mcore-models --disable-tp-comm-split-ag --ddp_num_buckets 4"
    assert main([*flags.split(), "--padded-vocab-size", "128", "--dry-run"]) == 0
    said = "no effect here    --tp-comm-overlap, --disable-tp-comm-split-ag, --ddp_num_buckets (docs/megatron.md)\n"
    assert said in "".join(capsys.readouterr())


def test_all_refused_flags_are_named_at_once(capsys):
    said = refused("--bf16", "--mtp-num-layers", "1", "--fim-data", "--lr", "1", capsys=capsys)
    assert "--mtp-num-layers 1: there is no multi-token prediction; use " in said and "--fim-data: " in said


def test_every_refusal_says_why_and_what_instead():
    assert all(why and instead and not why.endswith(".") for _, why, instead in REFUSED)


def test_values_of_settings_are_refused_with_a_reason(capsys):
    assert REFUSED_VALUES.keys() <= OURS
    for flag, values in REFUSED_VALUES.items():
        for value, (why, instead) in values.items():
            assert f"{flag} {value}: {why}; use {instead}" in refused(flag, value, capsys=capsys)
    modules = refused("--recompute-modules", "core_attn", "moe_act", capsys=capsys)
    assert "--recompute-modules moe_act: only Transformer Engine's" in modules


def test_values_of_accepted_flags_are_compared_as_numbers(capsys):
    assert run("--glu-linear-offset", "0.0", "--softmax-type=vanilla", "--moe-layer-freq", "1").model == run().model
    assert "--glu-linear-offset 0.1: the gate has no offset" in refused("--glu-linear-offset", "0.1", capsys=capsys)


def test_other_names():
    assert run("--recompute-activations").parallel.recompute_granularity == "selective"
    assert run("--persistent-save-interval", "5").checkpoint.save_interval == 5
    assert not run("--no-overlap-p2p-communication").parallel.overlap_p2p
    assert run("--skip-train").training.eval_only
    assert run("--moe-layer-recompute").parallel.recomputes("moe")


def test_number_of_layers(tmp_path, capsys):
    plain = run("--num-layers", "6").model
    assert (str(plain.segments), plain.recurrence) == ("6", "vanilla")
    plain.validate()
    for layers in ("16", "24"):  # with their own weights, or computed
        run("--num-layers", layers, "--layout", "4+8R2+4").model.validate()
        assert run("--num-layers", layers, "--preset", "pythia-410m").model.layout == "4+8R2+4"
    with pytest.raises(ValueError, match="--num-layers 20 .* 4[+]8R2[+]4, which has 16 layers and computes 24"):
        run("--num-layers", "20", "--layout", "4+8R2+4").model.validate()
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  layout: 1+2R2+1\n")
    assert run("--config", str(file), "--num-layers", "4").model.layout == "1+2R2+1"


@pytest.mark.parametrize("name", ["num_layers", "num-layers"])
def test_number_of_layers_in_a_file_is_a_plain_model_too(tmp_path, name):
    """8 and 12 are also the layers of the default layout, with their own weights and computed."""
    file = tmp_path / "run.yaml"
    for layers in (8, 12, 6):
        file.write_text(f"model:\n  {name}: {layers}\n")
        plain = run("--config", str(file)).model
        assert (str(plain.segments), plain.recurrence) == (str(layers), "vanilla")
    assert str(run("--config", str(file), "--num-layers", "4").model.segments) == "4"
    assert run("--config", str(file), "--layout", "1+2R2+1").model.layout == "1+2R2+1"


def test_gpt2s_files_name_their_tokenizer():
    files = ["--vocab-file", "vocab.json", "--merge-file", "merges.txt"]
    assert run(*files).data.tokenizer_type == "GPT2BPETokenizer"
    assert run(*files, "--tokenizer-type", "NullTokenizer").data.tokenizer_type == "NullTokenizer"


def test_groups_of_attention_heads():
    assert run("--num-attention-heads", "8").model.query_groups == 8
    assert run("--num-attention-heads", "8", "--group-query-attention").model.query_groups == 1
    assert (
        run("--num-attention-heads", "8", "--group-query-attention", "--num-query-groups", "2").model.query_groups == 2
    )


def test_delayed_scaling_is_chosen_by_its_flags():
    flags = ["--fp8-format", "hybrid", "--bf16"]
    assert run(*flags).fp8.fp8_recipe == "tensorwise"
    assert run(*flags, "--fp8-amax-history-len", "1024").fp8.fp8_recipe == "delayed"
    assert run(*flags, "--fp8-amax-history-len", "4", "--fp8-recipe", "mxfp8").fp8.fp8_recipe == "mxfp8"


def test_sequence_parallelism_of_one_rank_is_none(tmp_path):
    assert not run("--sequence-parallel").parallel.sequence_parallel
    assert not run("--sequence-parallel", "--tensor-model-parallel-size", "1").parallel.sequence_parallel
    assert run("--sequence-parallel", "--tensor-model-parallel-size", "2").parallel.sequence_parallel
    file = tmp_path / "run.yaml"
    file.write_text("parallel:\n  tensor_model_parallel_size: 2\n")
    assert run("--sequence-parallel", "--config", str(file)).parallel.sequence_parallel
    file.write_text("parallel:\n  tensor-model-parallel-size: 2\n")
    assert run("--sequence-parallel", "--config", str(file)).parallel.sequence_parallel
    assert not run("--sequence_parallel").parallel.sequence_parallel


def test_files_with_data_paths(tmp_path, capsys):
    blend, blends = tmp_path / "blend.txt", tmp_path / "blends.json"
    blend.write_text("0.3 wiki\n0.7 code\n")
    assert run("--data-args-path", str(blend)).data.data_path == ("0.3", "wiki", "0.7", "code")
    blends.write_text(json.dumps({"train": ["0.3", "a", "0.7", "b"], "valid": ["c"], "test": None}))
    data = run("--per-split-data-args-path", str(blends)).data
    assert (data.train_data_path, data.valid_data_path, data.test_data_path) == (("0.3", "a", "0.7", "b"), ("c",), ())
    blends.write_text('{"train": ["a"]}')
    said = refused("--per-split-data-args-path", str(blends), capsys=capsys)
    assert f"--per-split-data-args-path {blends}: must be JSON with the lists train, valid and test" in said
    assert "nowhere cannot be read" in refused("--data-args-path", "nowhere", capsys=capsys)


@pytest.mark.parametrize("recursion", ["", "--layout 8+8R2+8"])
def test_the_script_of_llama_3_is_taken_as_it_is(recursion):
    (example,) = [each for each in EXAMPLES if each.startswith("llama/")]
    real_data = ("--data-path", "--tokenizer-type HuggingFaceTokenizer", "--tokenizer-model")
    lines = [line for line in example.splitlines()[1:] if not line.startswith(real_data)]  # it is for mock data too
    values = {"--num-layers": 32, "--seq-length": 8192, "--max-position-embeddings": 8192, "--global-batch-size": 128}
    filled = [line.replace("VALUE", str(values.get(line.split()[0], 1))) for line in lines]
    config = run(*" ".join([*filled, recursion, "--dry-run"]).split())
    config.validate(8)
    model, training = config.model, config.training
    assert model.segments.computed_layers == 32 and model.query_groups == 8 and not config.parallel.sequence_parallel
    assert config.fp8.fp8_recipe == "delayed" and config.parallel.grad_reduce_in_bf16
    assert training.decoupled_lr == 5e-4 and training.lr_decay_samples == 1949218748 and training.manual_gc
