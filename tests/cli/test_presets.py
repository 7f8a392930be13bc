"""Presets are the paper's, and switching to one changes nothing else in the file."""

import json
from pathlib import Path

import pytest

from pipeline.cli.plan import AllParams
from pipeline.cli.presets import preset_of, presets, switch, teachers
from pipeline.core.config import read_yaml, validate
from pipeline.core.errors import ParamsError
from pipeline.embed.params import TeacherParams
from tests.conftest import ROOT

BILLIONS = {
    "qwen3-0.6b": 0.60, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19,
    "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.62,
    "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03,
    "gemma-3-1b": 1.0, "smollm2-135m": 0.13, "smollm2-360m": 0.36, "smollm2-1.7b": 1.71, "phi-4-mini": 3.84,
    "olmo-2-1b": 1.48, "olmo-2-7b": 7.3,
}  # fmt: skip

PARAMS = """\
# the top comment
backbone:
  name: models/own   # mine
  revision: null     # unpinned
  dtype: float32
  chat_template_kwargs: {}

# about the teacher
embed:
  teacher:
    kind: sentence-transformers
    name: models/other   # stands in
    prompt: "passage: "  # of that model
  dtype: float32

# about training
train:
  learning_rate: 1e-4  # tuned
  batch_size: 16
  micro_batch_size: 3

# about suites
suites:
  demo: {local: [a, b], benchmark: "MTEB(eng, v2)"}
"""


@pytest.fixture
def params(workspace: Path) -> Path:
    path = workspace / "params.yaml"
    path.write_text(PARAMS)
    return path


def test_sizes_follow_from_the_shapes() -> None:
    assert {name: round(preset.sizes.parameters() / 1e9, 2) for name, preset in presets().items()} == BILLIONS


def test_learning_rates_are_the_papers() -> None:
    published = {name: preset for name, preset in presets().items() if preset.published}
    assert len(published) == 11
    for name, preset in published.items():
        assert preset.learning_rate == (3e-4 if name.startswith("qwen3-") else 5e-4)


def test_revisions_are_commits_or_open() -> None:
    for preset in presets().values():
        revision = preset.backbone.revision
        assert revision is None or (len(revision) == 40 and int(revision, 16))


def test_teachers_are_the_papers_own_of_each_backbone() -> None:
    """The names of the paper's table of models; both adapters carry the backbone's name without its dots."""
    for name, preset in presets().items():
        assert preset.teacher.batch_tokens.keys() == {24, 80}
        if not preset.published:
            continue
        mntp, simcse = preset.teacher.adapters
        family = preset.backbone.name.split("/")[1].replace("Llama-3", "Meta-Llama-3").replace(".", "")
        assert mntp.name == f"McGill-NLP/LLM2Vec-{family}-mntp", name
        assert simcse.name == f"{mntp.name}-unsup-simcse"
        assert all(adapter.revision is None or len(adapter.revision) == 40 for adapter in (mntp, simcse))
        teacher = preset.teacher_params(24, "published")
        assert (teacher.name, teacher.revision) == (preset.backbone.name, preset.backbone.revision)
        assert teacher.batch_tokens <= preset.teacher_params(80, "published").batch_tokens


def test_where_none_is_published_the_teacher_is_the_echo_reading(params: Path) -> None:
    unpublished = {name for name, preset in presets().items() if not preset.published}
    assert unpublished >= {"gemma-3-1b", "smollm2-135m", "phi-4-mini", "olmo-2-7b"}
    switch(params, "qwen3-4b", 24)
    changes = switch(params, "smollm2-360m", 24)
    assert "embed.teacher.kind: llm2vec -> backbone" in changes
    content = read_yaml(params)
    teacher = content["embed"]["teacher"]
    assert (teacher["name"], teacher["revision"], teacher["adapters"]) == (None, None, [])
    # Both copies of an answer of 500 tokens have room.
    assert (teacher["template"], teacher["max_tokens"]) == ("echo", 1024)
    assert content["embed"]["transform"] == {"kind": "standardize", "decorrelate": 0.5, "shrinkage": 0.3}
    assert (content["train"]["response_form"], content["train"]["decorrelate_reading"]) == ("added", True)
    assert validate(teacher, TeacherParams, where="") == presets()["smollm2-360m"].teacher_params(24, "echo")
    switch(params, "llama-3.2-1b", 24)
    content = read_yaml(params)
    assert validate(content["embed"]["teacher"], TeacherParams, where="").kind == "llm2vec"
    assert content["embed"]["transform"] == {"kind": "auto"}
    assert (content["train"]["response_form"], content["train"]["decorrelate_reading"]) == ("beside", True)


def test_a_measured_reading_comes_and_goes_with_its_preset(params: Path) -> None:
    params.write_text((ROOT / "params.yaml").read_text())

    def reading() -> tuple[str, str, int]:
        train = read_yaml(params)["train"]
        return train["template"], train["pool"], train["max_query_tokens"]

    switch(params, "smollm2-135m", 24)
    assert reading() == ("echo", "both", 1024)
    validate(read_yaml(params), AllParams, where="")
    switch(params, "qwen3-0.6b", 24)
    assert reading() == ("chat", "tokens", 512)
    switch(params, "smollm2-135m", 24, paper=True)
    assert reading() == ("raw", "tokens", 512)


def test_there_and_back_the_shipped_file_is_the_same(params: Path) -> None:
    shipped = (ROOT / "params.yaml").read_text()
    params.write_text(shipped)
    for name in ("smollm2-135m", "llama-3.2-1b", "qwen3-4b"):
        switch(params, name, 80)
    assert params.read_text() == shipped


def test_a_reading_of_ones_own_stays(params: Path) -> None:
    params.write_text((ROOT / "params.yaml").read_text().replace("template: chat ", "template: raw "))
    switch(params, "qwen3-0.6b", 24)
    assert read_yaml(params)["train"]["template"] == "raw"


def test_a_transform_and_a_form_of_ones_own_stay_with_an_llm2vec(params: Path) -> None:
    own = "embed:\n  transform: {kind: whiten}\n  queries: true\n"
    params.write_text(PARAMS.replace("embed:\n", own).replace("train:\n", "train:\n  response_form: added\n"))
    switch(params, "llama-3.2-1b", 24)
    content = read_yaml(params)
    assert (content["embed"]["transform"], content["train"]["response_form"]) == ({"kind": "whiten"}, "added")
    # A reading that is mapped to the teacher's space is not decorrelated.
    switch(params, "smollm2-360m", 24)
    assert not read_yaml(params)["train"].get("decorrelate_reading")


def test_a_teacher_is_trained_here_where_it_is_asked_for_or_the_papers(params: Path) -> None:
    changes = switch(params, "smollm2-360m", 24, "trained")
    assert "embed.teacher.kind: sentence-transformers -> llm2vec-trained" in changes
    teacher = validate(read_yaml(params)["embed"]["teacher"], TeacherParams, where="")
    assert teacher == presets()["smollm2-360m"].teacher_params(24, "trained")
    params.write_text((ROOT / "params.yaml").read_text())
    switch(params, "smollm2-360m", 24)
    switch(params, "smollm2-360m", 24, paper=True)
    content = read_yaml(params)
    assert content["embed"]["teacher"]["kind"] == "llm2vec-trained"
    assert (content["embed"]["transform"], content["train"]["response_form"]) == ({"kind": "none"}, "beside")
    switch(params, "qwen3-4b", 24, "echo")
    assert read_yaml(params)["embed"]["teacher"]["kind"] == "backbone"


def test_the_authors_other_teacher_stands_behind_any_backbone(params: Path) -> None:
    switch(params, "llama-3.2-1b", 24)
    changes = switch(params, "qwen3-8b", 24, "bge-m3-unsupervised")
    content = read_yaml(params)
    teacher = validate(content["embed"]["teacher"], TeacherParams, where="")
    assert (teacher.kind, teacher.name) == ("sentence-transformers", "BAAI/bge-m3-unsupervised")
    assert (teacher.adapters, teacher.batch_tokens, content["embed"]["normalize"]) == ([], 32768, False)
    assert content["backbone"]["name"] == "Qwen/Qwen3-8B"
    assert content["embed"]["transform"] == {"kind": "none"}
    # Vectors of length 1: the mean over dimensions would hardly train.
    assert "train.align_reduction: mean -> sum" in changes
    assert "train.align_reduction: sum -> mean" in switch(params, "qwen3-8b", 24)
    for other in teachers().values():
        assert other.batch_tokens.keys() == {24, 80}
        assert other.revision is None or len(other.revision) == 40
    with pytest.raises(ParamsError, match=r"^teacher: unknown 'bge' \(known: echo, trained, bge-m3-unsupervised\)"):
        switch(params, "qwen3-8b", 24, "bge")


def test_the_passes_of_teach_fit_the_memory(workspace: Path) -> None:
    path = workspace / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    assert switch(path, "qwen3-4b", 80) == []
    changes = switch(path, "qwen3-4b", 24)
    assert {"teach.mntp.micro_batch_size: 8 -> 2", "teach.simcse.micro_batch_size: 32 -> 8"} <= set(changes)
    assert "# texts of one forward pass" in path.read_text()
    switch(path, "olmo-2-1b", 80)
    teach = read_yaml(path)["teach"]
    assert (teach["mntp"]["micro_batch_size"], teach["simcse"]["micro_batch_size"]) == (32, 64)


def test_the_papers_settings_are_set_whatever_the_file_says(workspace: Path) -> None:
    path = workspace / "params.yaml"
    own = {
        "response_form": "added",
        "decorrelate_reading": True,
        "template": "echo",
        "pool": "both",
        "response_share": 0.3,
        "refine": {"steps": 9},
        "batch_size": 64,
    }
    content = read_yaml(ROOT / "params.yaml")
    content["train"] |= own | {"heldout": {"every": 9, "rows": 99, "select": "mrr"}, "token_start": {"kind": "random"}}
    content["embed"]["transform"] = {"kind": "standardize"}
    path.write_text(json.dumps(content))
    changes = switch(path, "qwen3-4b", 80, paper=True)
    params = validate(read_yaml(path), AllParams, where="params.yaml")
    train = params.train
    assert (train.template, train.pool, train.response_share, train.refine) == ("raw", "tokens", 1.0, None)
    assert (train.warm_start.enabled, train.learning_rate, train.token_learning_rate) == (False, 3e-4, None)
    assert (train.schedule_steps, train.stop_after_steps, train.warmup_steps, train.batch_size) == (
        20000,
        5000,
        100,
        32,
    )
    assert (train.token_start.kind, train.compression_tokens, train.batch_size) == ("mean", 10, 32)
    assert (train.heldout.select, train.heldout.every) == (None, 9)
    assert (params.embed.transform.kind, params.generate.max_new_tokens) == ("none", 500)
    assert "train.template: echo -> raw" in changes
    assert (train.response_form, train.decorrelate_reading) == ("beside", False)
    assert switch(path, "qwen3-4b", 80, paper=True) == []


def test_switching_sets_the_preset_and_keeps_the_rest(params: Path) -> None:
    changes = switch(params, "qwen3-4b", 24)
    text = params.read_text()
    for line in PARAMS.splitlines():
        if "#" in line:
            assert line[line.index("#") :] in text
    content = read_yaml(params)
    preset = presets()["qwen3-4b"]
    assert content["backbone"] == preset.backbone.model_dump(exclude={"trust_remote_code"})
    assert content["embed"] == {
        "teacher": {
            "kind": "llm2vec",
            "name": "Qwen/Qwen3-4B",
            "revision": preset.backbone.revision,
            "adapters": [
                {"name": "McGill-NLP/LLM2Vec-Qwen3-4B-mntp", "revision": None},
                {"name": "McGill-NLP/LLM2Vec-Qwen3-4B-mntp-unsup-simcse", "revision": None},
            ],
            "dtype": "bfloat16",
            "batch_tokens": 16384,
            "prompt": "",
        },
        "normalize": False,
        "dtype": "float16",
    }
    assert content["train"] == {
        "align_reduction": "mean", "learning_rate": 3e-4, "batch_size": 16, "micro_batch_size": "auto"
    }  # fmt: skip
    assert content["suites"] == {"demo": {"local": ["a", "b"], "benchmark": "MTEB(eng, v2)"}}
    assert 'demo: {local: [a, b], benchmark: "MTEB(eng, v2)"}' in text
    assert changes[0] == "backbone.name: models/own -> Qwen/Qwen3-4B"
    adapters = next(line for line in changes if line.startswith("embed.teacher.adapters: None -> "))
    assert adapters.endswith("LLM2Vec-Qwen3-4B-mntp-unsup-simcse (not pinned)")
    assert len(changes) == 4 + 7 + 2 + 3


def test_comments_stay_with_their_sections(params: Path) -> None:
    switch(params, "qwen3-4b", 24)
    lines = params.read_text().splitlines()
    for comment, section in (("# about the teacher", "embed:"), ("# about training", "train:")):
        assert lines[lines.index(comment) + 1] == section
    assert lines[lines.index("# about suites") + 1] == "suites:"


def test_a_comment_after_the_adapters_stays(params: Path) -> None:
    params.write_text(
        PARAMS.replace(
            '    prompt: "passage: "  # of that model\n  dtype: float32\n',
            "    adapters:\n      - {name: a/b, revision: null}  # first\n      - {name: c/d}  # second\n",
        ).replace("kind: sentence-transformers", "kind: llm2vec")
    )
    switch(params, "qwen3-4b", 24)
    text = params.read_text()
    assert "unsup-simcse, revision: null}" in text
    assert [comment for comment in ("# first", "# second", "# about training") if comment not in text] == []
    assert text.index("# about training") < text.index("train:") < text.index("# about suites")
    assert read_yaml(params)["embed"]["dtype"] == "float16"


def test_a_pin_set_by_hand_is_kept_for_the_same_adapter(params: Path) -> None:
    switch(params, "qwen3-4b", 24)
    pinned = f"Qwen3-4B-mntp, revision: {'a' * 40}"
    params.write_text(params.read_text().replace("Qwen3-4B-mntp, revision: null", pinned))
    switch(params, "qwen3-4b", 80)
    assert read_yaml(params)["embed"]["teacher"]["adapters"][0]["revision"] == "a" * 40
    switch(params, "qwen3-1.7b", 80)
    assert read_yaml(params)["embed"]["teacher"]["adapters"][0]["revision"] is None


def test_a_pin_of_the_backbone_is_kept_where_the_preset_has_none(params: Path) -> None:
    switch(params, "gemma-3-1b", 24)
    assert read_yaml(params)["backbone"]["revision"] is None
    text = params.read_text()
    params.write_text(
        text.replace("revision: null", f"revision: {'b' * 40}", 1).replace("revision:\n", f"revision: {'b' * 40}\n", 1)
    )
    assert read_yaml(params)["backbone"]["revision"] == "b" * 40
    assert not [change for change in switch(params, "gemma-3-1b", 24) if "backbone.revision" in change]
    assert read_yaml(params)["backbone"]["revision"] == "b" * 40
    switch(params, "smollm2-135m", 24)
    assert read_yaml(params)["backbone"]["revision"] is None


def test_the_real_params_stay_valid_with_every_preset(workspace: Path) -> None:
    path = workspace / "params.yaml"
    for source, names in (("params.yaml", list(presets())), ("params.demo.yaml", ["qwen3-4b", "gemma-3-1b"])):
        path.write_text((ROOT / source).read_text())
        for name in names:
            switch(path, name, 24)
            params = validate(read_yaml(path), AllParams, where=name)
            assert params.embed.teacher == presets()[name].teacher_params(24, presets()[name].teacher_name)


def test_switching_twice_changes_nothing(params: Path) -> None:
    switch(params, "llama-3.1-8b", 80)
    before = params.read_bytes()
    assert switch(params, "llama-3.1-8b", 80) == []
    assert params.read_bytes() == before


def test_there_and_back_restores_the_real_params(workspace: Path) -> None:
    path = workspace / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    switch(path, "qwen3-4b", 80)
    real = path.read_text()
    for between, backbone in (("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct"), ("olmo-2-1b", "allenai/OLMo-2-0425-1B")):
        switch(path, between, 80)
        assert backbone in path.read_text()
    switch(path, "qwen3-4b", 80)
    assert path.read_text() == real


def test_mistakes_are_named(params: Path) -> None:
    with pytest.raises(ParamsError, match=r"unknown backbone 'gpt' \(known: qwen3-0.6b"):
        switch(params, "gpt", 80)
    with pytest.raises(ParamsError, match=r"memory: no batch sizes for 48 GB \(known: 24, 80\)"):
        switch(params, "qwen3-4b", 48)
    params.write_text("backbone: {name: a}\n")
    with pytest.raises(ParamsError, match="embed.teacher: missing"):
        switch(params, "qwen3-4b", 80)
    with pytest.raises(ParamsError, match="does not exist"):
        switch(params.with_name("none.yaml"), "qwen3-4b", 80)


def test_a_preset_is_found_by_its_backbone() -> None:
    found = preset_of("Qwen/Qwen3-8B")
    assert found is presets()["qwen3-8b"]
    assert preset_of("models/own") is None


def test_the_papers_rate_is_not_for_a_warm_start(params: Path) -> None:
    params.write_text(PARAMS.replace("train:\n", "train:\n  warm_start: {enabled: true}\n"))
    assert not any("learning_rate" in line for line in switch(params, "llama-3.2-1b", 24))
    assert "learning_rate: 1e-4  # tuned" in params.read_text()
