import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import environment, measure, report, sources
from bench import runner as runner_module
from bench.__main__ import main
from bench.case import Case, Cost, Missing, Op, Provider, cost_by_mode, eager, ops, ours
from bench.check import WrongResult, relative_error
from bench.compilation import Compilation, watch
from bench.measure import CpuTimer, Samples, quantile
from bench.results import BadResults, Results, load, our_row, validate
from bench.runner import Runner, interleave

ROOT = Path(__file__).resolve().parent.parent


def square(x):
    return x * x


def wrong_square(x):
    return x * x * 1.01


def wrong_gradient(x):
    return x.detach() * x


def raising(x):
    raise RuntimeError("out of order\nsecond line")


def build_missing():
    raise Missing("not for this machine")


def square_op(*providers: Provider, op: str = "square") -> Op:
    def make(generator: torch.Generator) -> dict:
        return {"x": torch.randn(2, 3, 4, 5, 6, generator=generator, requires_grad=True)}

    cost = cost_by_mode(Cost(2 * 720 * 4, 720), Cost(3 * 720 * 4, 1440))
    case = Case("small", make, cost, square, providers, shape={"shape": (2, 3, 4, 5, 6)})
    return Op(op, ("heatmap_argmax_3d",), ("heatmap_argmax3d",), lambda device, size: [case])


def run_op(path: Path, *providers: Provider, resume: bool = False) -> tuple[Results, Runner]:
    runner = Runner("cpu", "quick", Results(path), resume=resume)
    runner.measure([square_op(*providers)])
    return Results(path), runner


def statuses(store: Results) -> dict[str, set[str]]:
    return {
        name: {r["status"] for r in store.rows if r["provider"] == name} for name in {r["provider"] for r in store.rows}
    }


def test_every_case_runs_quickly_and_is_right(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "all.json"
    assert main(["--device", "cpu", "--quick", "--heap", "default", "--json", str(path)]) == 0
    store = Results(path)
    expected = {
        (op.name, case.name, mode, provider.name)
        for op in ops().values()
        for case in op.cases("cpu", "quick")
        for mode in case.cost
        for provider in case.providers
    }
    assert {(r["op"], r["case"], r["mode"], r["provider"]) for r in store.rows} == expected
    for row in store.rows:
        assert row["status"] in ("ok", "missing", "skipped"), row
        if row["role"] == "ours":
            assert row["status"] == "ok" and row["backend"]
            assert row["relative_error"] is not None
    assert "focal_dice_loss" in capsys.readouterr().out
    assert store.runs[0]["finished"] is not None


def test_cases_of_a_gpu_are_right_without_one(tmp_path: Path) -> None:
    """Their dtypes, layouts and tolerances on the CPU, so that time on a GPU is not lost to what shows here."""

    def on_cpu(op: Op) -> Op:
        return dataclasses.replace(op, cases=lambda device, size: op.cases("cuda", "quick"))

    path = tmp_path / "gpu.json"
    Runner("cpu", "quick", Results(path)).measure([on_cpu(op) for op in ops().values()])
    rows = load(path)["rows"]
    # whose backend there is another one here may refuse bfloat16, but not be wrong
    assert [row for row in rows if row["role"] == "ours" and row["status"] != "ok"] == []
    assert [row for row in rows if row["status"] == "wrong"] == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_full_cases_are_well_formed(device: str) -> None:
    for op in ops().values():
        found = op.cases(device, "full")
        assert len({case.name for case in found}) == len(found) > 0
        for case in found:
            names = [provider.name for provider in case.providers]
            assert len(set(names)) == len(names)
            assert {"ours", "eager"} <= {provider.role for provider in case.providers}
            assert all(cost.bytes > 0 for cost in case.cost.values())
            if "bwd" in case.cost:
                assert case.cost["fwdbwd"] == case.cost["fwd"] + case.cost["bwd"]


@pytest.mark.parametrize(
    ("device", "number", "module"), [("cpu", 1, "torchvision.ops"), ("cuda", 0, "roi_al_extension_3d")]
)
def test_peers_of_roi_align_get_the_right_boxes(
    device: str, number: int, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their published arithmetic, since they are not installed here."""
    loops = pytest.importorskip("test_roi_align3d")

    def torchvision(x, boxes, out, sampling_ratio, aligned):
        return loops.roi_align_2d(x, boxes.tolist(), tuple(out), 1.0, sampling_ratio, aligned)

    def toolkit(x, boxes, scale, *bins_and_ratio):
        return loops.roi_align_mdt(x.double(), boxes.tolist(), bins_and_ratio[:3], bins_and_ratio[3]).to(x.dtype)

    fake = types.ModuleType(module)
    fake.roi_align = torchvision if device == "cpu" else toolkit
    for name in {module, module.split(".")[0]}:
        monkeypatch.setitem(sys.modules, name, fake)
    case = ops()["roi_align_3d"].cases(device, "quick")[number]
    (peer,) = [p for p in case.providers if p.name in ("torchvision.ops.roi_align", "medicaldetectiontoolkit")]
    inputs = case.make(torch.Generator().manual_seed(0))
    inputs["x"] = inputs["x"].detach()
    torch.testing.assert_close(peer.build()(**inputs), case.oracle(**inputs), rtol=1e-4, atol=1e-5)


def test_kernels_of_every_op_are_found() -> None:
    for op in ops().values():
        found = [path for device in ("cpu", "cuda") for path in sources.source_files(op, device)]
        names = {path.relative_to(ROOT).as_posix() for path in found}
        for stem in op.stems:
            assert stem in {Path(name).stem for name in names}
        assert all((ROOT / name).is_file() for name in names)


def test_the_formulas_that_cases_import_make_results_stale_too() -> None:
    for op in ops().values():
        names = {path.relative_to(ROOT).as_posix() for path in sources.source_files(op, "cpu")}
        text = (ROOT / "bench" / "cases" / f"{op.name}.py").read_text()
        if "from focuskernels.reference import nn" in text or "from focuskernels.reference.nn import" in text:
            assert "focuskernels/reference/nn.py" in names, op.name


def test_what_kernels_import_makes_results_stale_too() -> None:
    for op in ops().values():
        names = {path.relative_to(ROOT).as_posix() for path in sources.source_files(op, "cuda")}
        for name in [name for name in names if name.startswith("focuskernels/kernels/")]:
            imported = re.findall(
                r"^from \.(\w+) import|^from \. import (\w+)", (ROOT / name).read_text(), re.MULTILINE
            )
            assert {f"focuskernels/kernels/{a or b}.py" for a, b in imported} <= names, (op.name, name)


@pytest.mark.parametrize("function", [wrong_square, wrong_gradient])
def test_wrong_result_is_an_error_and_not_a_time(tmp_path: Path, function) -> None:
    store, runner = run_op(tmp_path / "r.json", ours(square), eager(function))
    assert runner.failed
    assert statuses(store) == {"focuskernels": {"ok"}, "eager": {"wrong"}}
    row = next(r for r in store.rows if r["status"] == "wrong")
    assert "median_ms" not in row and "is off by" in row["reason"]


def test_missing_and_failing_peers_are_listed_and_do_not_stop_the_others(tmp_path: Path) -> None:
    missing = Provider("peer", "peer", build_missing)
    store, runner = run_op(tmp_path / "r.json", ours(square), missing, eager(raising))
    assert not runner.failed
    assert statuses(store) == {"focuskernels": {"ok"}, "peer": {"missing"}, "eager": {"failed"}}
    reasons = {row["provider"]: row["reason"] for row in store.rows}
    assert reasons == {"focuskernels": None, "peer": "not for this machine", "eager": "RuntimeError: out of order"}


def test_rounding_of_the_formula_is_allowed_twice(tmp_path: Path) -> None:
    def measured(factor: float, rounded: float | None) -> set[str]:
        op = square_op(ours(lambda x: x * x * factor))
        (case,) = op.cases("cpu", "quick")
        case = dataclasses.replace(case, rounded=None if rounded is None else lambda x: x * x * rounded)
        store = Results(tmp_path / "r.json")
        Runner("cpu", "quick", store).measure([dataclasses.replace(op, cases=lambda device, size: [case])])
        return statuses(store)["focuskernels"]

    assert measured(1.0, 1.2) == measured(1.39, 1.2) == {"ok"}
    assert measured(1.41, 1.2) == measured(1.1, None) == {"wrong"}


def test_ours_failing_is_an_error(tmp_path: Path) -> None:
    _, runner = run_op(tmp_path / "r.json", ours(raising), eager(square))
    assert runner.failed


def test_resume_measures_only_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    first, _ = run_op(path, ours(square), eager(square))
    again, _ = run_op(path, ours(square), eager(square), resume=True)
    assert again.rows == first.rows
    more, _ = run_op(path, ours(square), eager(square), eager(square, "another", "peer"), resume=True)
    assert {row["run"] for row in more.rows} == {2}
    monkeypatch.setattr(runner_module, "source_hash", lambda op, device: "changed")
    changed, _ = run_op(path, ours(square), eager(square), resume=True)
    assert {row["sources"] for row in changed.rows if row["provider"] != "another"} == {"changed"}


def test_without_a_role_and_resumed_with_it(tmp_path: Path) -> None:
    path, providers = tmp_path / "r.json", (ours(square), eager(square), eager(square, "another", "peer"))
    work = Runner("cpu", "quick", Results(path), without=["peer"])
    work.measure([square_op(*providers)])
    assert {row["provider"] for row in load(path)["rows"]} == {"focuskernels", "eager"}
    # Measured again beside the one that is new, since only times of one run are compared.
    store, _ = run_op(path, *providers, resume=True)
    assert {(row["provider"], row["run"]) for row in store.rows} == {(p.name, 2) for p in providers}
    assert main(["square", "--without", "ours"]) == 2


def test_compilations_and_trials_are_counted(tmp_path: Path) -> None:
    knobs = pytest.importorskip("triton.knobs")
    tiles = importlib.import_module("focuskernels.kernels.dilated_conv3d_tiles")
    race = tiles.race

    def compiling(x):
        # as Triton and the launcher of a convolution do
        listener = knobs.compilation.listener
        times = knobs.CompileTimes(ir_initialization=250_000, lowering_stages=[("ptx", 250_000)], store_results=0)
        listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=False)
        listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=True)
        assert tiles.race(["a", "b", None], {"a": 2.0, "b": 1.0, None: 3.0}.get) == "b"
        return x * x

    found = Compilation()
    with watch(found):
        compiling(torch.ones(1))
    assert (found.compiled, found.compile_s, found.cached, found.trials) == (1, 0.5, 1, 3)
    assert knobs.compilation.listener is None and tiles.race is race

    def once(x):
        return compiling(x) if knobs.compilation.listener is not None else x * x

    store, _ = run_op(tmp_path / "r.json", ours(once), eager(square))
    rows = {(row["mode"], row["provider"]): row["kernels"] for row in store.rows}
    # forward and both are checked, then each mode is called once at its real size before it is timed
    assert [rows[mode, "focuskernels"]["compiled"] for mode in ("fwd", "bwd", "fwdbwd")] == [3, 4, 5]
    assert rows["fwd", "focuskernels"]["trials"] == 9
    assert rows["fwd", "eager"] is None


def test_what_compiling_took_outlives_a_run_with_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, took = tmp_path / "r.json", [Compilation(4, 2.5, 0, 3, 0.5)]
    monkeypatch.setattr(runner_module, "Compilation", lambda: took[0])
    run_op(path, ours(square))
    took[0] = Compilation(0, 0.0, 4, 0, 0.0)
    store, _ = run_op(path, ours(square))
    kept = {"compiled": 4, "compile_s": 2.5, "cached": 0, "trials": 3, "trial_s": 0.5}
    assert [(row["run"], row["kernels"]) for row in store.rows] == [(2, kept)] * 3
    monkeypatch.setattr(runner_module, "source_hash", lambda op, device: "changed")
    store, _ = run_op(path, ours(square))
    assert [row["kernels"]["compiled"] for row in store.rows] == [0, 0, 0]


def test_cpu_rows_tell_of_no_compilation(tmp_path: Path) -> None:
    store, _ = run_op(tmp_path / "r.json", ours(square))
    assert {row["kernels"] for row in store.rows} == {None}


def test_a_new_run_replaces_rows_and_keeps_other_ops(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    run_op(path, ours(square))
    Runner("cpu", "quick", Results(path)).measure([square_op(ours(square), op="other")])
    store, _ = run_op(path, ours(square))
    assert sorted((row["op"], row["run"]) for row in store.rows if row["mode"] == "fwd") == [
        ("other", 2),
        ("square", 3),
    ]
    assert [run["id"] for run in store.runs] == [2, 3]


def test_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(CpuTimer):
        calls = 0

        def time(self, call):
            if getattr(self, "counting", False):
                Impatient.calls += 1
                if Impatient.calls == 6:
                    raise KeyboardInterrupt
            super().time(call)
            return 1.0, True  # whatever else the machine is doing, the same number of samples

    monkeypatch.setattr(runner_module, "timer", lambda device, size: Impatient(4096))
    path = tmp_path / "r.json"
    work = Runner("cpu", "quick", Results(path), say=lambda line: setattr(work.timer, "counting", "square" in line))
    with pytest.raises(KeyboardInterrupt):
        work.measure([square_op(ours(square), eager(square))])
    kept = {(row["mode"], row["provider"]): row["partial"] for row in load(path)["rows"]}
    assert kept == {("fwd", "focuskernels"): False, ("fwd", "eager"): False, ("bwd", "focuskernels"): True}
    resumed, _ = run_op(path, ours(square), eager(square), resume=True)
    assert len(resumed.rows) == 6 and not any(row["partial"] for row in resumed.rows)
    assert {row["run"] for row in resumed.rows if row["mode"] == "fwd"} == {1}


def test_schema_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    run_op(path, ours(square))
    document = json.loads(path.read_text())
    validate(document)
    document["rows"][0]["median_ms"] = "fast"
    with pytest.raises(ValueError, match="'median_ms' of a row is 'fast'"):
        validate(document)
    path.write_text(json.dumps({"schema": 2}))
    with pytest.raises(BadResults, match=r"r\.json: expected benchmark results of schema 1"):
        load(path)


def test_peak_memory_counts_temporaries_alone() -> None:
    x = torch.ones(1000, 100)
    peak = CpuTimer(4096).peak(lambda: ((x + 1) * 2 + 1, {"x": x}))
    # two temporaries, or one more, live beside the result
    assert x.nbytes <= peak <= 2 * x.nbytes
    # but for the number 1, which is a tensor for a moment
    assert CpuTimer(4096).peak(lambda: (x + 1, {"x": x})) < 64
    assert CpuTimer(4096).peak(lambda: (x.view(-1), {"x": x})) == 0


def test_noisy_samples_are_set_aside() -> None:
    samples = Samples()
    for value, quiet in [(1.0, True), (9.0, False), (2.0, True), (3.0, True)]:
        samples.add(value, quiet)
    assert samples.summary() == {"median_ms": 2.0, "p20_ms": 1.4, "p80_ms": 2.6, "samples": 3, "noisy_samples": 1}
    assert quantile([5.0], 0.2) == 5.0


def test_sampling_takes_turns_and_ends() -> None:
    order = []

    class Fake:
        def time(self, call):
            call()
            return 1.0, len(order) % 3 != 0

        def peak(self, call):
            return 0

    class FakeStep:
        def __init__(self, name):
            self.name = name

        def prepare(self, inputs):
            return lambda: order.append((self.name, inputs))

    into: dict[str, Samples] = {}
    steps = {name: FakeStep(name) for name in "ab"}
    measure.sample(steps, [0, 1], Fake(), measure.Effort(3, 3, 0.0), into)
    assert [name for name, _ in order[:4]] == ["a", "b", "b", "a"]
    assert {inputs for _, inputs in order} == {0, 1}
    assert all(len(samples.quiet) >= 3 for samples in into.values())


def test_relative_error() -> None:
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x * 1.5, x) == pytest.approx(0.5)
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    assert relative_error(None, torch.zeros(3)) == 0 and relative_error(None, x) == float("inf")
    with pytest.raises(WrongResult, match="shape"):
        relative_error(x, torch.zeros(3))


def test_interleave() -> None:
    assert list(interleave([[1, 2, 3], [4], [5, 6]])) == [1, 4, 5, 2, 6, 3]


def test_source_hash_follows_included_headers(tmp_path: Path) -> None:
    for folder in ("focuskernels/reference", "csrc"):
        (tmp_path / folder).mkdir(parents=True)
    op = Op("op", (), ("stem",), lambda device, size: [])
    files = {"focuskernels/stem.py": "a", "csrc/stem.cpp": '#include "common.h"\n', "csrc/common.h": "x"}
    for name, text in {**files, "csrc/other.h": "y"}.items():
        (tmp_path / name).write_text(text)
    before = sources.source_hash(op, "cpu", tmp_path)
    (tmp_path / "csrc/other.h").write_text("changed")
    assert sources.source_hash(op, "cpu", tmp_path) == before
    (tmp_path / "csrc/common.h").write_text("changed")
    assert sources.source_hash(op, "cpu", tmp_path) != before


def test_report_marks_stale_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    run_op(results / "cpu.json", ours(square), eager(square), Provider("peer", "peer", build_missing))
    document = json.loads((results / "cpu.json").read_text())
    document["runs"][0]["size"] = "full"
    (results / "cpu.json").write_text(json.dumps(document))
    docs.mkdir()
    (docs / "benchmarks.md").write_text(f"intro\n{report.BEGIN}\nold\n{report.END}\nend\n")
    arguments = ["--results", str(results), "--docs", str(docs)]
    monkeypatch.setattr(report, "ops", lambda: {"square": square_op()})
    monkeypatch.setattr(report, "draw", lambda machines, folder: {})
    assert report.main(arguments) == 0
    text = (docs / "benchmarks.md").read_text(encoding="utf-8")
    assert text.startswith("intro\n") and text.endswith(f"{report.END}\nend\n") and "old" not in text
    assert "### square" in text and "not for this machine" in text and "stale" not in text
    monkeypatch.setattr(report, "source_hash", lambda op, device: "changed")
    assert report.main(arguments) == 0
    assert "(stale)" in (docs / "benchmarks.md").read_text(encoding="utf-8")


def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of a GPU and of two CPUs, made of one measurement."""
    run_op(tmp_path / "made.json", ours(square), eager(square))
    text = (tmp_path / "made.json").read_text()
    results = tmp_path / "results"
    results.mkdir()
    for name, device, device_name in (("a", "cpu", "One CPU"), ("b", "cpu", "Another CPU"), ("c", "cuda", "A GPU")):
        document = json.loads(text)
        document["runs"][0] |= {"device": device, "device_name": device_name, "size": "full"}
        for row in document["rows"]:
            row |= {"kernels": {"compiled": 2, "compile_s": 3.0, "cached": 1, "trials": 4, "trial_s": 0.5}}
            if device != "cuda" or row["role"] != "ours":
                row["kernels"] = None
        (results / f"{name}.json").write_text(json.dumps(document))
    return results


def test_report_of_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, docs = machines(tmp_path, monkeypatch), tmp_path / "docs"
    docs.mkdir()
    (docs / "benchmarks.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    monkeypatch.setattr(report, "ops", lambda: {"square": square_op()})
    pytest.importorskip("matplotlib")
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    text = (docs / "benchmarks.md").read_text(encoding="utf-8")
    threads = torch.get_num_threads()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    heap = environment.heap()
    assert headings == [
        f"## One CPU, {threads} threads, {heap} heap",
        f"## Another CPU, {threads} threads, {heap} heap",
        "## A GPU",
    ]
    assert text.count("### square") == 3 and text.count("stale") == 0
    assert text.count("Kernels: 2 compiled in 3.0 s, 1 from Triton's cache; 4 trials of tiles in 0.5 s.") == 1
    shown = re.findall(r"!\[.*?\]\((img/.*?)\)", text)
    assert len(shown) == len(set(shown)) == 6 and all((docs / name).is_file() for name in shown)
    # Once more gives the same page: nothing depends on when it is made.
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    assert (docs / "benchmarks.md").read_text(encoding="utf-8") == text


def test_plots_are_drawn(tmp_path: Path) -> None:
    plots = pytest.importorskip("bench.plots", reason="needs matplotlib")
    store, _ = run_op(tmp_path / "r.json", ours(square), eager(square))
    names = plots.draw_machine([(store.run_of(row), row) for row in store.rows], tmp_path, "cpu-1", lambda row: True)
    assert names == ["cpu-1-ratios.png", "cpu-1-roofline.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["focal_dice_los"], "error: no op named focal_dice_los; did you mean focal_dice_loss?"),
        (["--device", "tpu"], "error: argument --device: invalid choice: 'tpu'"),
        (["--threads", "0"], "error: --threads must be positive, got 0"),
        (["--plans", "-1"], "error: --plans must be at least 0, got -1"),
        (["--json", "{bad}"], "expected benchmark results of schema 1"),
    ],
)
def test_usage_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert (
        main([a.format(bad=bad) for a in arguments] + ["--quick", "--device", "cpu"][: 1 if "tpu" in arguments else 3])
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_cuda_without_a_gpu_is_one_line() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench", "--device", "cuda"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == f"error: --device cuda: torch {torch.__version__} finds no GPU\n"


STUB = """#!/bin/sh
echo "$*" >> "{calls}"
case "$*" in
    *--names*) printf '%s\\n' dense_aspp3d focusnet norm_act roi_align_3d snet ;;
    *norm_act*) echo broken >&2; exit 3 ;;
    *bench*--json*) touch "{out}/gpu.json" ;;
esac
"""


@pytest.mark.parametrize(("part", "resume"), [("", False), ("ops", True), ("bench", False)])
def test_gpu_script_goes_on_after_a_failure(part: str, resume: bool, tmp_path: Path) -> None:
    stub, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    stub.write_text(STUB.format(calls=calls, out=out))
    stub.chmod(0o755)
    out.mkdir()
    (out / "gpu.json").write_text("before")
    variables = {name: value for name, value in os.environ.items() if name != "RESUME"}
    variables |= {"RESUME": "1"} if resume else {}
    command = [str(ROOT / "tools" / "gpu.sh"), str(stub), str(out), part]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    done = calls.read_text().splitlines()
    benches = [line for line in done if line.startswith("-m bench") and "--names" not in line and "--quick" not in line]
    everything = f"-m bench --device cuda --json {out}/gpu.json --resume"
    if part == "bench":
        assert run.returncode == 0 and benches == [everything]
        return
    # The long ones last, each in a process of its own; one that fails keeps none of the others from running.
    each = [
        f"-m bench {op} --device cuda --without compile --plans 10 --json {out}/gpu.json"
        for op in ("norm_act", "roi_align_3d", "dense_aspp3d", "focusnet", "snet")
    ]
    assert benches == [line + " --resume" * resume for line in each] + [everything] * (part == "")
    assert run.returncode == 1
    assert "== ops-norm_act failed: exit code 3" in run.stdout
    assert (out / "gpu-before.json").exists() != resume
    assert ("-m pytest -v -m (gpu or kernels) and not large and not slow" in calls.read_text()) == (part == "")
    # Few files to fetch: one log, which holds all that was said.
    assert {path.name for path in out.iterdir()} <= {"gpu.json", "gpu-before.json", f"{part or 'all'}.log"}
    log = (out / f"{part or 'all'}.log").read_text()
    assert "broken\n== ops-norm_act failed: exit code 3\n== ops-roi_align_3d, after " in log


def test_gpu_script_runs_every_file_with_gpu_tests_that_of_most_kernels_last(tmp_path: Path) -> None:
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB.format(calls=calls, out=tmp_path))
    stub.chmod(0o755)
    subprocess.run([str(ROOT / "tools" / "gpu.sh"), str(stub), str(tmp_path / "out"), "tests"], timeout=120, check=True)
    (line,) = (line for line in calls.read_text().splitlines() if "-m pytest" in line and "and not large" in line)
    files = re.findall(r"tests/(test_\w+\.py)", line)
    marked = [p.name for p in (ROOT / "tests").glob("test_*.py") if re.search(r"mark\.(gpu|kernels)", p.read_text())]
    assert sorted(files) == sorted(set(marked)) and files[-1] == "test_linear_focal_dice_triton.py"


def test_a_time_limit_leaves_what_the_tests_found(tmp_path: Path) -> None:
    """As tools/gpu.sh ends them: with SIGTERM."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(100)\n")
    found = tmp_path / "found.xml"
    command = [
        sys.executable,
        "-u",
        "-m",
        "pytest",
        "-v",
        f"--rootdir={tmp_path}",
        f"--junitxml={found}",
        str(tmp_path),
    ]
    run = subprocess.Popen([*command, "-p", "no:cacheprovider"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    # the name of a test is written when it begins
    assert any("test_b" in line or "test_a PASSED" in line for line in run.stdout)
    run.terminate()
    assert run.wait(timeout=60) == pytest.ExitCode.INTERRUPTED
    assert 'name="test_a"' in found.read_text()


def test_a_fault_of_the_gpu_fails_no_other_test(tmp_path: Path) -> None:
    """Every call fails in a process that met one."""
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("""
import torch
torch.cuda.is_initialized = lambda: True
def fails(): raise RuntimeError("CUDA error")
def lives(): pass
torch.cuda.synchronize = lives
def test_a(): torch.cuda.synchronize = fails
def test_b(): torch.cuda.synchronize()
def test_c(): torch.cuda.synchronize()
""")
    command = [sys.executable, "-m", "pytest", "-n", "1", f"--rootdir={tmp_path}", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "1 failed, 3 passed" in run.stdout and "crashed while running 'test_it.py::test_a'" in run.stdout


def test_settings_end_with_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOCUSKERNELS_STRICT", raising=False)
    cudnn = torch.backends.cudnn

    def now() -> tuple[object, ...]:
        return cudnn.benchmark, cudnn.benchmark_limit, os.environ.get("FOCUSKERNELS_STRICT")

    before = now()
    with environment.settings(10):
        assert now()[0] is True and now()[2] == "1"
        with environment.without_search():
            assert not cudnn.benchmark
        assert cudnn.benchmark
    assert now() == before


def test_limits_of_the_gpu_script_fit() -> None:
    """25 minutes in all, each part with what every part begins with under 10, tests and ops under 13."""
    text = (ROOT / "tools" / "gpu.sh").read_text()
    limits = {name.strip('"'): int(limit) for name, limit in re.findall(r"step (\S+) (\d+) ", text)}
    (ops_limit,) = re.findall(r"end=\$\(\(SECONDS \+ (\d+)\)\)", text)
    begin = limits["build"] + limits["info"]
    tests, ops = limits["tests"] + limits["tests-large"], int(ops_limit)
    parts = [tests, ops, limits["bench"], limits["sanitize-compile"] + 2 * limits["sanitize-$tool"]]
    assert begin + sum(parts) <= 25 * 60
    assert begin + max(parts) < 10 * 60
    assert begin + tests + ops <= 13 * 60


def test_only_torch_is_needed() -> None:
    blocked = ["monai", "nnunetv2", "rich", "matplotlib", "SimpleITK", "scipy", "yaml", "jsonargparse", "pytest"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "from bench.__main__ import main\n"
        "sys.exit(main(['heatmap_argmax_3d', 'se_residual', '--device', 'cpu', '--quick', '--json', sys.argv[1]]))"
    )
    path = ROOT / ".pytest_cache" / f"bench-{os.getpid()}.json"
    try:
        run = subprocess.run(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        rows = load(path)["rows"]
    finally:
        path.unlink(missing_ok=True)
    assert "heatmap_argmax_3d" in run.stdout
    assert {row["status"] for row in rows if row["provider"] == "MONAI ChannelSELayer"} == {"missing"}
    assert our_row(rows) is not None
