import io
import json
import math
import sys

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.metrics import METRICS_FILE, PROGRESS_METRICS, MetricsWriter, read_metrics
from dni_rl.files import LOCK_FILE


def _events(folder, tag):
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def _write_run(folder, steps, **options):
    with MetricsWriter(folder, total_steps=100, **options) as writer:
        for step in steps:
            writer.write(step, {"charts/episodic_return": float(step), "loss/policy": torch.tensor(step / 2)})


def test_rows_hold_agent_steps_and_numbers(tmp_path):
    with MetricsWriter(tmp_path / "run", total_steps=100, tensorboard=False) as writer:
        writer.write(
            0, {"a": 1.5, "b": torch.tensor([2.5], requires_grad=True), "c": torch.tensor(3, dtype=torch.int64)}
        )
        writer.write(2**53, {"a": torch.tensor(True), "b": torch.tensor(2**40 + 1), "c": 1})
    assert read_metrics(tmp_path / "run") == [
        {"step": 0, "a": 1.5, "b": 2.5, "c": 3.0},
        {"step": 2**53, "a": 1.0, "b": 2.0**40 + 1, "c": 1.0},
    ]


def test_tensorboard_shows_the_same_numbers_and_the_hyperparameters(tmp_path):
    _write_run(tmp_path, [10, 20], hyperparameters={"run": {"seed": 3}})
    assert _events(tmp_path, "charts/episodic_return") == [(10, 10.0), (20, 20.0)]
    assert _events(tmp_path, "loss/policy") == [(10, 5.0), (20, 10.0)]
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    (text,) = accumulator.Tensors("hyperparameters/text_summary")
    assert text.tensor_proto.string_val[0] == b"```\nrun:\n  seed: 3\n```"


def test_a_resumed_run_has_every_step_once(tmp_path):
    _write_run(tmp_path, [10, 20, 30, 40], hyperparameters={})
    _write_run(
        tmp_path, [30, 40, 50], resume_step=20, hyperparameters={}
    )  # the checkpoint was at 20, the crash after 40
    steps = [10, 20, 30, 40, 50]
    assert [row["step"] for row in read_metrics(tmp_path)] == steps
    assert [step for step, _ in _events(tmp_path, "charts/episodic_return")] == steps


def test_a_resumed_run_without_its_metrics_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"metrics.jsonl: not found, allowed the metrics of the run's first 20 steps, .*; bring"
    ):
        MetricsWriter(tmp_path, total_steps=50, resume_step=20, tensorboard=False)
    assert not (tmp_path / "metrics.jsonl").exists()
    _write_run(tmp_path, [10], resume_step=0, tensorboard=False)  # of a run cut off before its first row
    (tmp_path / "metrics.jsonl").write_text("")  # what the message offers
    _write_run(tmp_path, [30], resume_step=20, tensorboard=False)
    assert [row["step"] for row in read_metrics(tmp_path)] == [30]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    _write_run(tmp_path, [10, 20], tensorboard=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "episode/ret')
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]
    _write_run(tmp_path, [30], resume_step=20, tensorboard=False)
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    with MetricsWriter(tmp_path, total_steps=1, tensorboard=False) as writer:
        writer.write(1, {"a": math.inf, "b": torch.tensor(math.nan)})
    _write_run(tmp_path, [2], resume_step=1, tensorboard=False)  # kept through a resume
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(line) == {"step": 1, "a": None, "b": None}
    row = read_metrics(tmp_path)[0]
    assert math.isnan(row["a"]) and math.isnan(row["b"])


def test_rows_can_be_read_while_the_run_goes_on_after_a_flush(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=10)
    writer.write(1, {"a": 1.0})
    writer.flush()
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.0}]
    writer.close()
    writer.close()


def test_a_new_run_does_not_mix_with_an_earlier_one(tmp_path):
    _write_run(tmp_path, [10], tensorboard=False)
    with pytest.raises(
        ValueError,
        match=r"metrics\.jsonl: found metrics of an earlier run, allowed none; continue it with --resume, .*, or remove its folder",
    ):
        MetricsWriter(tmp_path, total_steps=100)


def test_two_processes_do_not_write_to_the_same_run(tmp_path):
    with MetricsWriter(tmp_path, total_steps=10, tensorboard=False) as writer:
        writer.write(5, {})
        writer.flush()
        before = (tmp_path / METRICS_FILE).read_text()
        with pytest.raises(ValueError, match="found another process that writes to this run, allowed one; wait for it"):
            MetricsWriter(tmp_path, total_steps=10, resume_step=0, tensorboard=False)
        assert (tmp_path / METRICS_FILE).read_text() == before != ""
    MetricsWriter(tmp_path, total_steps=10, resume_step=5, tensorboard=False).close()


def test_without_the_package_of_tensorboard_no_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError):
        MetricsWriter(tmp_path / "run", total_steps=100)
    assert not (tmp_path / "run").exists()
    _write_run(tmp_path / "run", [10], tensorboard=False)


@pytest.mark.parametrize("row", ["nonsense", '{"loss": 1}', '{"step": null}'])
def test_a_damaged_row_is_refused(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{row}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: found text that is not a row of metrics; repair or"):
        read_metrics(tmp_path)


def test_missing_metrics_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: found no metrics; expected the folder of a run"):
        read_metrics(tmp_path)


def test_wrong_calls_are_refused(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=10, tensorboard=False)
    with pytest.raises(
        ValueError, match=r"^loss: found a tensor of shape \(2,\); expected one number; reduce it first"
    ):
        writer.write(1, {"loss": torch.zeros(2)})
    writer.write(5, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"^step: found 4 after 5; expected agent steps, which never decrease"):
        writer.write(4, {"loss": 1.0})
    writer.close()
    with pytest.raises(RuntimeError, match="write after close"):
        writer.write(6, {"loss": 1.0})


def test_progress_is_a_bar_in_a_terminal_and_elsewhere_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    times = iter([0.0, 9.0, 11.0, 12.0, 13.0])
    with monkeypatch.context() as patch:
        patch.setattr("agents.metrics.time.monotonic", lambda: next(times))
        with MetricsWriter(tmp_path / "a", total_steps=4000, tensorboard=False) as writer:
            for step in (1000, 2000, 3000, 4000):
                writer.write(step, {"charts/success_rate": 0.5 if step < 4000 else math.nan})
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'a'}: step 0 of 4,000",
        f"{tmp_path / 'a'}: step 2,000 of 4,000, success 0.5",
        f"{tmp_path / 'a'}: step 4,000 of 4,000, success 0.5",
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with MetricsWriter(tmp_path / "b", total_steps=100, tensorboard=False) as writer:
        writer.write(50, dict(zip(PROGRESS_METRICS, [0.5, torch.tensor(0.75)], strict=True)))
        writer.write(100, dict.fromkeys(PROGRESS_METRICS, math.nan))  # no episode ended
    err = capsys.readouterr().err
    assert "return=0.5, success=0.75" in err
    assert "100/100" in err
    assert "steps/s" in err
    _write_run(tmp_path / "c", [50], tensorboard=False, progress=False)
    assert capsys.readouterr().err == ""


def test_weights_over_steps_become_a_histogram(tmp_path):
    with MetricsWriter(tmp_path, total_steps=10) as writer:
        writer.write_histogram(3, "credit/x", torch.tensor([1.0, 0.0, 3.0]))
        writer.write_histogram(4, "credit/x", torch.zeros(3))  # nothing to show
        writer.write_histogram(5, "credit/x", torch.tensor([1.0, torch.nan]))
        writer.write_histogram(6, "credit/x", torch.tensor([2.0], dtype=torch.float64, requires_grad=True))
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    first, second = events.Histograms("credit/x")
    assert (first.step, second.step) == (3, 6)
    assert list(first.histogram_value.bucket) == [0.25, 0.0, 0.75]
    assert list(first.histogram_value.bucket_limit) == [1.5, 2.5, 3.5]
    assert first.histogram_value.sum == 0.25 + 3 * 0.75 and first.histogram_value.sum_squares == 0.25 + 9 * 0.75
    assert list(second.histogram_value.bucket) == [1.0]


def test_figures_become_images_with_the_colours_that_they_have(tmp_path):
    figure = Figure(figsize=(2.0, 1.0), dpi=10, facecolor="red")
    with MetricsWriter(tmp_path, total_steps=10) as writer:
        assert writer.has_tensorboard
        writer.write_figure(3, "credit/x", figure)
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("credit/x")
    assert event.step == 3
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert image.size == (20, 10) and image.getpixel((5, 5)) == (255, 0, 0)


def test_without_tensorboard_figures_and_histograms_go_nowhere(tmp_path):
    with MetricsWriter(tmp_path, total_steps=10, tensorboard=False) as writer:
        assert not writer.has_tensorboard
        writer.write_histogram(3, "credit/x", torch.ones(2))
        writer.write_figure(3, "credit/x", Figure())
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", LOCK_FILE}


def test_a_resumed_run_keeps_the_board_of_custom_scalars(tmp_path):
    _write_run(tmp_path, [10, 20])
    _write_run(tmp_path, [20], resume_step=10)
    (event,) = EventAccumulator(str(tmp_path)).Reload().Tensors("custom_scalars__config__")
    assert b"charts/success_rate$" in event.tensor_proto.string_val[0]
