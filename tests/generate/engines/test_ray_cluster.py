"""Ray on three nodes, all on this machine: engines, teachers and encoders, lost nodes and a killed owner."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from bench.plan_scale import Cluster, simulate
from pipeline.backbone.loading import BackboneParams
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.artifacts import open_artifact
from pipeline.core.config import validate
from pipeline.core.errors import EngineError, TeacherError
from pipeline.core.paths import ENCODER_DIR
from pipeline.core.row_store import ShardStore
from pipeline.evaluate.build import SystemInputs, make_systems
from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.engines.ray import RayEngine, RayOptions
from pipeline.generate.engines.registry import build_engine
from pipeline.generate.generator import Generator
from pipeline.generate.response_counts import STORE
from pipeline.parallel.ray_cluster import ENVIRONMENT, connected
from pipeline.parallel.text_pool import TextPool
from tests.conftest import ROOT, tiny_tokenizer
from tests.encoder.test_inference import write as write_encoder
from tests.generate.engines.conftest import GREEDY, SIZES, agree
from tests.generate.engines.ray_stage import BAD, SECONDS, SumEngine, process, together
from tests.stage_runs import errors_of, kept_rows, wait_until, write_params, write_queries

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("ray")

log = logging.getLogger(__name__)

TEXTS = {f"{index:03d}": f"{'long ' * (index % 7)}question {index}" for index in range(110)} | {"077": BAD}
# Of the template and a text; some of `TEXTS` have one token more.
MOST_TOKENS = 44
NODE = {"num_cpus": 3, "object_store_memory": 100 * 2**20}
# A lost node is noticed within two seconds. Workers that wait are kept: to start another takes a busy machine long.
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
QUICK |= {"idle_worker_killing_time_threshold_ms": 300_000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes, whose address is $RAY_ADDRESS."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    head = {**NODE, "include_dashboard": False, "_system_config": QUICK}
    started = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            started.add_node(**NODE)
        started.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = started.address
        yield started
    finally:
        for node in (*started.worker_nodes, started.head_node):
            started.remove_node(node, allow_graceful=False)  # gracefully they take ten seconds
        os.environ.clear()
        os.environ.update(before)


def lose(cluster: Any, node_ids: set[str]) -> None:
    """Kill one of these nodes, which is not the head, and start another."""
    import ray

    sockets = {node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] in node_ids}
    victim = next(node for node in cluster.worker_nodes if node.raylet_socket_name in sockets)
    cluster.remove_node(victim, allow_graceful=False)
    cluster.add_node(**NODE)


def nodes_of(marks: Path) -> set[str]:
    """The nodes whose actors have left a mark."""
    return {mark.name.split("-")[1] for mark in marks.iterdir()}


def pids_of(marks: Path) -> list[int]:
    """The actors that have left a mark and live."""
    pids = [int(mark.name.split("-")[0]) for mark in marks.iterdir()]
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """A folder in which actors leave marks."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture
def on_ray(cluster: Any, marks: Path) -> Iterator[Callable[..., RayEngine]]:
    """Makes a `RayEngine` on the cluster, with `least` small engines that answer once they are `most`."""
    with ExitStack() as stack:
        stack.enter_context(connected(error=EngineError, argument="address"))

        def make(least: int, most: int, delay: float = 0.03, chunk_rows: int = 4, cpus: int = 1) -> RayEngine:
            made = process(marks, (least, most), delay, together=most, cpus=cpus)
            options = RayOptions(chunk_rows=chunk_rows, timeout_seconds=SECONDS)
            return RayEngine(made, {2}, 2 * MOST_TOKENS, options, prompt_makers=2)

        yield make


def generated(store: Path, engine: Any, asked: Mapping[str, str] = TEXTS) -> tuple[Generator, pa.Table]:
    """The rows of some texts as the stage makes them."""
    ids = pa.array(sorted(asked))
    texts = pa.table({"id": ids, "text": [asked[row_id] for row_id in ids.to_pylist()]})
    with ShardStore(store, STORE, {}, flush_rows=8) as rows:
        formatter = PromptFormatter(tiny_tokenizer(), "chat", MOST_TOKENS)
        generator = Generator(rows, lambda: engine, formatter, Sampling(4), 5, 1.0, drop_too_long=True)
        generator.run(lambda: [ids], [texts])
        return generator, pa.concat_tables(generator.tables([ids], 40))


class Watched:
    """An engine on the cluster; `watch` is called before each answer is given."""

    def __init__(self, engine: RayEngine, watch: Callable[[int], None]) -> None:
        self._engine, self._watch = engine, watch
        self.generate, self.close = engine.generate, engine.close

    def answer(self, *arguments: Any) -> Iterator[Any]:
        for number, found in enumerate(self._engine.answer(*arguments)):
            self._watch(number)
            yield found


def test_interrupted_then_grown_and_losing_a_node_it_answers_as_one_engine(
    cluster: Any, on_ray: Callable[..., RayEngine], marks: Path, tmp_path: Path
) -> None:
    one, rows = generated(tmp_path / "one", SumEngine())

    def interrupt(number: int) -> None:
        if number == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generated(tmp_path / "ray", Watched(on_ray(1, 1), interrupt))
    for mark in marks.iterdir():
        mark.unlink()

    def lose_one(number: int) -> None:
        if number == 10:
            lose(cluster, nodes_of(marks))

    found, answered = generated(tmp_path / "ray", Watched(on_ray(1, 3), lose_one))
    assert answered.equals(rows)
    assert found.facts.reused_rows >= 8
    assert found.facts.reused_rows + found.facts.computed_rows + found.facts.dropped_rows == len(TEXTS) - 1
    assert [run.facts.retried_rows for run in (one, found)] == [1, 1]
    assert sum(row["finish_reason"] == "error" for row in rows.to_pylist()) > 1
    assert not list((tmp_path / "ray").glob("*/todo"))


@pytest.mark.parametrize("lost_at", [40, 65, 90])
def test_a_lost_node_costs_what_the_plan_simulates(
    cluster: Any, on_ray: Callable[..., RayEngine], marks: Path, tmp_path: Path, lost_at: int
) -> None:
    """Rows computed twice, against `bench/plan_scale.py` with the rate and the restart that were measured."""
    rows, delay, shard, killed = 150, 0.15, 10, list[float]()

    def lose_one(number: int) -> None:
        if number == lost_at:
            killed.append(time.time())
            lose(cluster, nodes_of(marks))

    texts = {f"{index:03d}": f"question {index}" for index in range(rows)}
    engine = on_ray(3, 3, delay=delay, chunk_rows=shard, cpus=2)  # a node has room for one
    generator, _ = generated(tmp_path / "ray", Watched(engine, lose_one), texts)
    assert generator.facts.computed_rows == rows

    lines = [line.split() for mark in marks.iterdir() for line in mark.read_text().splitlines()]
    done = sorted(float(at) for what, at in lines if what != "up")
    assert len({what for what, _ in lines}) == rows + 1
    began = done[0] - delay
    lost_after, twice = killed[0] - began, len(done) - rows
    # Near the end the other two nodes may be done before the new one is up.
    back = min((float(at) for what, at in lines if what == "up" and float(at) > killed[0]), default=float("inf"))
    before = sum(at < killed[0] for at in done)
    if before >= rows:
        pytest.skip(f"a busy machine: all rows were computed before the driver had read {lost_at}")

    # Half a row is in the works: a node that is lost exactly between two shards would count as an idle one.
    rate = (before + 0.5) / lost_after / 3
    nodes = Cluster(3, rate, shard, restart_seconds=back - killed[0], writer_rows_per_second=1e9)
    plan = simulate(rows, nodes, chain([lost_after], repeat(float("inf"))).__next__)
    log.info("lost after %.1f s of %.1f, %d rows twice; %s: %s", lost_after, done[-1] - began, twice, nodes, plan)
    assert plan.failures == 1
    assert 0 <= twice <= shard
    assert abs(twice - plan.recomputed_rows) <= shard


def start_stage() -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.generate.engines.ray_stage"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_owner_killed_and_run_again(cluster: Any, tiny_backbone: Callable[..., Path], workspace: Path) -> None:
    write_queries(TEXTS.values())
    options = {"chunk_rows": 4, "replicas": 2}
    sizes = {"dtype": "float32", "max_new_tokens": 4, "max_prompt_tokens": MOST_TOKENS, "max_failed_fraction": 0.1}
    write_params(
        backbone={"name": str(tiny_backbone()), "dtype": "float32"},
        generate={"engine": "ray", **sizes, "options": options},
    )
    marks = Path("marks")
    marks.mkdir()
    owner = start_stage()
    wait_until(lambda: kept_rows("generate") > 0, owner, SECONDS)
    owner.kill()
    errors_of(owner)
    kept = kept_rows("generate")
    assert 0 < kept < len(TEXTS)
    deadline = time.monotonic() + SECONDS
    while pids_of(marks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not pids_of(marks)
    owner = start_stage()
    assert "Traceback" not in errors_of(owner)
    assert owner.returncode == 0
    facts = json.loads(Path("results/generate.json").read_text())
    table = open_artifact(Path("data/responses"), "responses").read()
    assert table.num_rows == len(set(table["id"].to_pylist())) == len(TEXTS)
    failed = table["finish_reason"].to_pylist().count("error")
    assert (facts["reused_rows"], facts["computed_rows"], failed) == (kept, len(TEXTS) - kept - failed, 1)


# --- teachers and encoders ------------------------------------------------------------------------------------------


class Slow:
    """What a pool holds: once three are up, it counts characters, slowly, and says where."""

    name = "slow"

    def __init__(self, marks: Path) -> None:
        import ray

        self._node, self._marks = ray.get_runtime_context().get_node_id(), marks
        (marks / self._node).touch()

    def lengths(self, texts: Sequence[str]) -> tuple[str, list[int]]:
        together(self._marks, 3)
        time.sleep(0.1)
        return self._node, [len(text) for text in texts]


def name_of(held: Slow) -> str:
    return held.name


def refuse() -> None:
    raise TeacherError("0 is below 1", argument="width")


def test_a_pool_on_three_nodes_that_loses_one(cluster: Any, marks: Path) -> None:
    texts = [f"{'x' * (index % 9)}" for index in range(120)]
    with closing(
        TextPool(partial(Slow, marks), name_of, "ray", job_texts=4, kind="worker", error=TeacherError)
    ) as pool:
        assert (pool.facts, len(pool)) == ("slow", 3)
        lengths, nodes = dict[int, int](), list[str]()
        for rows, (node, values) in pool.run("lengths", texts):
            assert not lengths.keys() & set(rows)
            lengths |= zip(rows, values, strict=True)
            nodes.append(node)
            if len(nodes) == 10:
                lose(cluster, set(nodes))
        assert [lengths[row] for row in range(len(texts))] == [len(text) for text in texts]
        assert len(set(nodes)) > 1
        with pytest.raises(TeacherError, match=r"^width: 0 is below 1"):
            TextPool(refuse, name_of, "ray", job_texts=4, kind="worker", error=TeacherError)


def test_student_and_teacher_of_an_evaluation_on_the_cluster(
    cluster: Any, tiny_backbone: Callable[..., Path], workspace: Path
) -> None:
    lm = tiny_backbone("qwen3")
    write_encoder(ENCODER_DIR, lm, None)
    sections = {
        "backbone": {"name": str(lm), "dtype": "float32"},
        "generate": {"engine": "echo", "dtype": "float32", "max_new_tokens": 8, "max_prompt_tokens": 64},
        "embed": {"teacher": {"kind": "hash", "options": {"width": 6}}},
    }
    texts, names = [*TEXTS.values()][:40], ["student", "teacher"]
    found: list[list[np.ndarray]] = []
    for where in (1, "ray"):
        evaluate = {"systems": names, "dtype": "float32", "data_parallel": where, "local_dir": "tasks"}
        inputs = validate(
            {**sections, "evaluate": {**evaluate, "cache_embeddings": False}}, SystemInputs, where="params"
        )
        with closing(make_systems(inputs)) as systems:
            found.append([system.encode(texts, "Say:") for system in systems.build(names)])
    for here, there in zip(*found, strict=True):
        np.testing.assert_allclose(there, here, atol=1e-5)


# --- vLLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.models
def test_vllm_on_two_nodes(
    cluster: Any, small_lm: Path, questions: list[Prompt], by_transformers: dict[str, Completion]
) -> None:
    pytest.importorskip("vllm")
    options = {"replicas": 2, "chunk_rows": 2, "max_num_seqs": 2, "kv_cache_memory_bytes": 2**27}
    bad = [Prompt("long", [100] * 90, 0), Prompt("stranger", [1, 10**6], 0)]
    with closing(build_engine("ray", BackboneParams(name=str(small_lm)), **SIZES, options=options)) as engine:
        found, computing = list[Completion](), set[psutil.Process]()
        for answer in engine.generate(iter([*bad, *questions]), GREEDY):
            found.append(answer)
            computing |= {child for child in psutil.Process().children(recursive=True) if "EngineCor" in child.name()}
    assert len(computing) == 2
    assert not psutil.wait_procs(computing, timeout=20)[1]
    rows = {answer.id: answer for answer in found}
    assert len(found) == len(rows) == len(questions) + 2
    assert "prompt too long: 90 tokens + 16 new ones exceed 96" in str(rows["long"].error)
    assert rows["stranger"].finish_reason == "error"
    assert agree(rows, by_transformers)
