"""The whole params file is checked at once, and the plan's estimates follow their formulas."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.cli.cost import make_costs
from pipeline.cli.plan import AllParams, backbone_sizes, expected_rows, load_all, make_plan
from pipeline.core.artifacts import create
from pipeline.core.config import read_yaml
from pipeline.core.errors import BackboneError, ParamsError, TrainingError
from tests.conftest import ROOT


def written(workspace: Path, change: Any) -> Path:
    content = read_yaml(ROOT / "params.yaml")
    change(content)
    path = workspace / "params.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(content, file)
    return path


def real() -> AllParams:
    return load_all(ROOT / "params.yaml")


@pytest.mark.parametrize("file", ["params.yaml", "params.demo.yaml"])
def test_the_shipped_files_are_valid(file: str) -> None:
    load_all(ROOT / file)


def test_all_mistakes_of_all_sections_come_at_once(workspace: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["trian"] = {}
        content["train"]["learning_rat"] = 1.0
        del content["generate"]["engine"]
        content["collect"]["sample"] = "many"
        content["probes"]["safety"]["topk"] = [1]
        content["probes"]["nothing"] = {}
        content["suites"]["mteb-eng-v2"] = {}

    with pytest.raises(ParamsError) as caught:
        load_all(written(workspace, change))
    message = str(caught.value)
    for part in (
        "trian: unknown key (did you mean 'train'?)",
        "train.learning_rat: unknown key (did you mean 'learning_rate'?)",
        "generate.engine: missing",
        "collect.sample:",
        "topk: unknown key",
        "probes.nothing: there is no such probe",
        "suites.mteb-eng-v2: ",
    ):
        assert part in message, part


def test_an_instruction_that_training_would_repeat_is_refused(workspace: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["collect"]["sources"][0]["instruction"] = "Explain:"
        content["train"]["template"] = "echo"

    with pytest.raises(TrainingError, match=r"train\.template: echo repeats collect\.sources\.0\.instruction"):
        make_plan(load_all(written(workspace, change)))


@pytest.mark.parametrize("stage", ["generate", "train"])
def test_an_instruction_that_would_be_cut_off_is_refused(workspace: Path, stage: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["collect"]["sources"][0]["instruction"] = "Explain:"
        content[stage]["too_long"] = "keep_end"

    with pytest.raises(BackboneError, match=rf"{stage}\.too_long: keep_end .*collect\.sources\.0\.instruction"):
        make_plan(load_all(written(workspace, change)))


def test_a_form_that_train_would_refuse_is_refused_before_anything_runs(workspace: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["train"]["response_form"] = "added"
        content["embed"]["transform"] = {"kind": "center"}

    with pytest.raises(TrainingError, match=r"train\.response_form: added.*embed\.queries: true"):
        make_plan(load_all(written(workspace, change)), workspace)

    def with_queries(content: dict[str, Any]) -> None:
        change(content)
        content["embed"]["queries"] = True
        content["train"]["decorrelate_reading"] = False

    lines = {stage: what for stage, what, _ in make_plan(load_all(written(workspace, with_queries)), workspace).lines}
    assert lines["embed"].endswith("tokens read, and the queries")

    def decorrelated(content: dict[str, Any]) -> None:
        content["train"] |= {"response_form": "added", "decorrelate_reading": True}
        content["embed"] |= {"teacher": {"kind": "backbone"}, "transform": {"kind": "standardize"}}

    with pytest.raises(TrainingError, match=r"train\.decorrelate_reading: true.*decorrelate: 0\.5"):
        make_plan(load_all(written(workspace, decorrelated)), workspace)


def test_sizes_from_a_local_config(workspace: Path, tiny_backbone: Any) -> None:
    folder = tiny_backbone("qwen3")
    backbone = real().backbone.model_copy(update={"name": str(folder)})
    sizes = backbone_sizes(backbone, workspace)
    assert sizes is not None
    assert (sizes.layers, sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim) == (3, 32, 4, 2, 8)
    (workspace / "odd").mkdir()
    (workspace / "odd/config.json").write_text("{}")
    assert backbone_sizes(backbone.model_copy(update={"name": "odd"}), workspace) is None


@pytest.mark.parametrize("content", ["", '{"hidden_size": 8', "[]"])
def test_a_damaged_config_of_a_model_is_named(workspace: Path, content: str) -> None:
    (workspace / "own").mkdir()
    (workspace / "own/config.json").write_text(content)
    params = real()
    backbone = params.backbone.model_copy(update={"name": "own"})
    with pytest.raises(BackboneError, match=r"^backbone\.name: .*own/config\.json "):
        make_plan(params.model_copy(update={"backbone": backbone}), workspace)
    teacher = params.embed.teacher.model_copy(update={"name": "own"})
    embed = params.embed.model_copy(update={"teacher": teacher})
    with pytest.raises(BackboneError, match=r"^embed\.teacher\.name: .*own/config\.json "):
        make_costs(params.model_copy(update={"embed": embed}), None, workspace)


@pytest.mark.parametrize("name", ["models/own/qwen", "/data/qwen", "models/qwen/"])
def test_a_folder_that_is_not_there_gives_a_plan_that_says_so(workspace: Path, name: str) -> None:
    (workspace / "models/own").mkdir(parents=True)
    params = real()
    backbone = params.backbone.model_copy(update={"name": name, "revision": None})
    plan = make_plan(params.model_copy(update={"backbone": backbone}), workspace)
    assert f"backbone.name: no sizes known of {name}, so no memory estimate" in plan.remarks
    assert any(line.startswith("backbone.revision: ") and name in line for line in plan.remarks)


def test_an_unknown_backbone_gives_a_plan_without_memory(workspace: Path) -> None:
    backbone = real().backbone.model_copy(update={"name": "nobody/nothing"})
    plan = make_plan(real().model_copy(update={"backbone": backbone}), workspace)
    assert "backbone.name: no sizes known of nobody/nothing, so no memory estimate" in plan.remarks


def test_the_real_plan(workspace: Path) -> None:
    plan = make_plan(real(), workspace)
    lines = {stage: f"{what} | {where}" for stage, what, where in plan.lines}
    assert list(lines) == [
        "collect", "generate", "embed", "train", "evaluate@mteb-eng-v2", "probe@alignment", "probe@safety",
        "probe@refusal", "probe@reasoning", "probe@interpret", "report",
    ]  # fmt: skip
    assert "at most 160,000 queries" in lines["collect"]
    assert "without near duplicates, texts of the evaluation" in lines["collect"]
    assert "at most 80,000,000 tokens written" in lines["generate"]
    assert "weights 8.0 GB" in lines["generate"]
    assert "about 4,950 steps of 32 rows" in lines["train"]
    assert re.search(r"at most \d+\.\d GB \(weights 8\.0, activations ", lines["train"])
    assert "BrightBiologyRetrieval and 11 more; 12 mteb tasks: " in lines["probe@reasoning"]
    assert re.search(r"MTEB\(eng, v2\); 41 mteb tasks: 1,\d{3},\d{3} texts, about", lines["evaluate@mteb-eng-v2"])
    adapter = "McGill-NLP/LLM2Vec-Qwen3-4B-mntp"
    assert plan.remarks == [
        f"embed.teacher.adapters.0.revision: {adapter} is not pinned: set the commit",
        f"embed.teacher.adapters.1.revision: {adapter}-unsup-simcse is not pinned: set the commit",
        "probes.safety.revision: McGill-NLP/AdvBench-IR-chunked is not pinned: set the commit",
        "probes.refusal.revision: Paul/XSTest is not pinned: set the commit",
        "collect.local_dir: data/sources does not exist, `dvc repro` needs it",
        "evaluate.local_dir: data/tasks does not exist, `dvc repro` needs it",
    ]


def test_sources_and_tasks_that_dvc_does_not_watch_are_remarked(workspace: Path) -> None:
    for folder in ("data/sources/own", "data/tasks/find", "elsewhere"):
        Path(folder).mkdir(parents=True)
    Path("data/sources/linked").symlink_to(workspace / "elsewhere")
    Path("data/tasks/linked").symlink_to(workspace / "elsewhere")

    def change(content: dict[str, Any]) -> None:
        paths = ["own/a.txt", str(workspace / "b.txt"), "linked/c.txt", "../d.txt"]
        content["collect"]["sources"] = [{"kind": "local", "path": path} for path in paths]
        content["suites"] = {"own": {"local": ["find", "linked"]}}

    remarks = make_plan(load_all(written(workspace, change)), workspace).remarks
    found = [remark for remark in remarks if "DVC does not watch it" in remark]
    assert [remark.partition(":")[0] for remark in found] == [
        "collect.sources.1.path", "collect.sources.2.path", "collect.sources.3.path", "suites.own.local.1",
    ]  # fmt: skip
    assert "`dvc repro --single-item --force collect`" in found[0]
    assert "`dvc repro --single-item --force evaluate@own`" in found[3]


def test_local_data_and_models_that_are_not_there_are_remarked(workspace: Path) -> None:
    for folder in ("data/sources/empty", "data/tasks/find", "models"):
        Path(folder).mkdir(parents=True)
    Path("data/sources/there.txt").write_text("a\n")

    def change(content: dict[str, Any]) -> None:
        paths = ["there.txt", "*.txt", "gone.txt", "*.csv", "empty"]
        content["backbone"] = {"name": "models/gone", "revision": None}
        content["collect"]["sources"] = [{"kind": "local", "path": path} for path in paths]
        content["suites"] = {"own": {"local": ["find", "fnd"]}}
        content["probes"] = {
            "safety": {"local": "find", "harmless": {"local": "gone"}},
            "reasoning": {"local": ["find", "reson"]},
        }
        content["embed"]["teacher"] = {"kind": "llm2vec-trained"}
        content["teach"]["quality"]["local"] = ["find", "qualty"]

    remarks = make_plan(load_all(written(workspace, change)), workspace).remarks
    missing = {
        "backbone.revision": "models/gone",
        "collect.sources.2.path": "data/sources/gone.txt",
        "collect.sources.3.path": "data/sources/*.csv",
        "collect.sources.4.path": "data/sources/empty",
        "suites.own.local.1": "data/tasks/fnd",
        "probes.safety.harmless.local": "data/tasks/gone",
        "probes.reasoning.local.1": "data/tasks/reson",
        "teach.quality.local.1": "data/tasks/qualty",
    }
    found = dict(remark.split(": ", 1) for remark in remarks)
    for key, name in missing.items():
        assert name in found[key], key
    there = (
        "collect.sources.0",
        "collect.sources.1",
        "suites.own.local.0",
        "probes.safety.local",
        "probes.reasoning.local.0",
    )
    assert not [remark for remark in remarks if remark.startswith(there)]


@pytest.mark.parametrize("name", ["MTEB(eng, v2)", "a b", "x;touch y", "$(id)", "a/b", "..", "-x", "", "é", "a\n"])
@pytest.mark.parametrize("section", ["suites", "probes"])
def test_a_name_that_a_shell_could_misread_is_refused(workspace: Path, section: str, name: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content[section] = {name: {"local": ["find"]}}

    with pytest.raises(ParamsError) as caught:
        load_all(written(workspace, change))
    assert f"{section}.{name}" in str(caught.value) and "is no name of an entry" in str(caught.value)


def test_rows_that_are_there_count_instead_of_the_sample(workspace: Path) -> None:
    assert expected_rows(real(), workspace) == (160_000, False)
    with create(Path("data/queries"), kind="queries", params=real().collect.model_dump()):
        pass
    assert expected_rows(real(), workspace) == (0, True)
    smaller = real().collect.model_copy(update={"sample": 500})
    assert expected_rows(real().model_copy(update={"collect": smaller}), workspace) == (500, False)
    Path("data/queries/manifest.json").unlink()
    unbounded = real().collect.model_copy(update={"sample": None})
    assert expected_rows(real().model_copy(update={"collect": unbounded}), workspace) == (None, False)


def test_a_teacher_of_adapters_is_named_and_its_pins_and_scale_are_remarked(workspace: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        adapters = [{"name": "org/mntp", "revision": "a" * 40}, {"name": "org/simcse"}]
        content["embed"]["teacher"] = {"kind": "llm2vec", "adapters": adapters}
        content["train"]["align_reduction"] = "sum"

    plan = make_plan(load_all(written(workspace, change)), workspace)
    (embed,) = (where for stage, _, where in plan.lines if stage == "embed")
    assert embed == "Qwen/Qwen3-4B + org/mntp + org/simcse"
    assert "embed.teacher.adapters.1.revision: org/simcse is not pinned: set the commit" in plan.remarks
    assert not any("org/mntp" in remark for remark in plan.remarks)
    assert any("align_reduction: sum over the dimensions of llm2vec" in remark for remark in plan.remarks)


@pytest.mark.parametrize(
    ("template", "most", "said"),
    [
        ("text", 499, ["an answer of up to 500 tokens"]),
        ("text", 500, []),
        ("echo", 999, ["2 copies of an answer of up to 500 tokens"]),
        ("echo", 1000, []),
    ],
)
def test_a_teacher_that_reads_less_than_is_written_is_remarked(
    workspace: Path, template: str, most: int, said: list[str]
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["generate"]["max_new_tokens"] = 500
        content["embed"]["teacher"] = {"kind": "backbone", "template": template, "max_tokens": most}

    remarks = make_plan(load_all(written(workspace, change)), workspace).remarks
    beginning = f"embed.teacher.max_tokens: {most} for "
    found = [remark.removeprefix(beginning) for remark in remarks if remark.startswith(beginning)]
    assert [remark.partition(":")[0] for remark in found] == said


@pytest.mark.parametrize(
    ("normalize", "reduction", "remarked"), [(True, "mean", True), (True, "sum", False), (False, "mean", False)]
)
def test_a_mean_over_unit_length_targets_is_remarked(
    workspace: Path, normalize: bool, reduction: str, remarked: bool
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["embed"] |= {"teacher": {"kind": "backbone"}, "normalize": normalize, "transform": {"kind": "none"}}
        content["train"]["align_reduction"] = reduction

    remarks = make_plan(load_all(written(workspace, change)), workspace).remarks
    assert any("the reconstruction undoes a warm start: sum" in remark for remark in remarks) is remarked


@pytest.mark.parametrize(("teacher", "remarked"), [("backbone", False), ("hash", True)])
def test_what_fits_an_automatic_transform_of_unit_length_targets_is_not_known(
    workspace: Path, teacher: str, remarked: bool
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["embed"] |= {"teacher": {"kind": teacher}, "transform": {"kind": "auto"}}

    remarks = make_plan(load_all(written(workspace, change)), workspace).remarks
    assert any("embed.transform auto" in remark for remark in remarks) is remarked


@pytest.mark.parametrize("teacher", ["backbone", "hash"])
@pytest.mark.parametrize(("kind", "reduction", "remarked"), [("whiten", "sum", True), ("whiten", "mean", False)])
def test_a_sum_over_whitened_targets_is_remarked(
    workspace: Path, teacher: str, kind: str, reduction: str, remarked: bool
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["embed"] |= {"teacher": {"kind": teacher}, "transform": {"kind": kind}}
        content["train"]["align_reduction"] = reduction

    plan = make_plan(load_all(written(workspace, change)), workspace)
    remarks = [remark for remark in plan.remarks if "align_reduction" in remark]
    assert len(remarks) == remarked
    assert all("variance 1 each (embed.transform whiten)" in remark for remark in remarks)
    assert any(f"{teacher}, transform whiten" in what for _, what, _ in plan.lines)


def test_stubs_and_cut_answers_are_remarked(workspace: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["generate"] |= {"engine": "echo", "max_new_tokens": 900, "options": {}}
        content["embed"]["teacher"] = {"kind": "hash"}

    remarks = make_plan(load_all(written(workspace, change)), workspace).remarks
    assert any("echo is a stub" in remark for remark in remarks)
    assert any("hash is a stub" in remark for remark in remarks)
    assert "train.max_response_tokens: 900 tokens are written, 512 are learnt from" in remarks


def test_models_and_data_of_the_evaluation_that_are_not_pinned_are_remarked(workspace: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        models = {"mini": {"name": "org/mini"}, "pinned": {"name": "org/other", "revision": "a" * 40}}
        content["evaluate"] |= {"models": models, "systems": ["student", "mini", "pinned"]}
        content["probes"]["safety"]["harmless"] = {"dataset": "org/passages"}

    remarks = make_plan(load_all(written(workspace, change)), workspace).remarks
    assert "evaluate.models.mini.revision: org/mini is not pinned: set the commit" in remarks
    assert "probes.safety.harmless.revision: org/passages is not pinned: set the commit" in remarks
    assert not any("org/other" in remark for remark in remarks)
