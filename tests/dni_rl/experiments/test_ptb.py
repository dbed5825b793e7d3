"""Penn Treebank: what is read, bits per character, both ratios, every arm, resuming."""

import json
import math

import pytest
import torch

from dni_rl import data
from dni_rl.experiments import common, ptb

SMALL = {
    "dataset": "synthetic",
    "hidden_size": 6,
    "critic_hidden_sizes": (4,),
    "embedding_size": 3,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "critic_learning_rate": 1e-2,
    "warmup_updates": 2,
    "window": 3,
    "num_steps": 48,
    "log_every_steps": 12,
    "eval_every_steps": 12,
    "checkpoint_every_steps": 24,
    "valid_tokens": 50,
}


def small(**settings):
    return ptb.PtbConfig(**{**SMALL, **settings})


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(result):
    return {**result, "seconds": 0.0, "curve": [{**point, "seconds": 0.0} for point in result["curve"]]}


# Text


def test_training_windows_by_hand():
    text = torch.arange(10) * 10
    assert ptb.training_window(text, 2, 0, 3).tolist() == [[0, 50], [10, 60], [20, 70], [30, 80]]
    assert ptb.training_window(text, 2, 3, 3).tolist() == [[30, 80], [40, 90], [50, 0], [60, 10]]  # round the end
    assert ptb.training_window(text, 3, 1, 1).tolist() == [[10, 40, 70], [20, 50, 80]]


def test_every_token_is_read_equally_often():
    text = torch.arange(7)
    read = torch.cat([ptb.training_window(text, 2, step, 1)[0] for step in range(7)])
    assert read.bincount().tolist() == [2] * 7


@pytest.mark.parametrize("columns", [1, 3, 4])
@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_every_token_but_the_first_is_a_target_once(columns, num_steps):
    text = torch.arange(11)
    seen = []
    for inputs, targets, inside in ptb.evaluation_windows(text, columns, num_steps):
        assert inputs.shape == targets.shape == inside.shape and len(inputs) <= num_steps
        assert torch.equal(inputs[inside] + 1, targets[inside])
        seen += targets[inside].tolist()
    assert sorted(seen) == list(range(1, 11))


def test_the_synthetic_text_needs_no_files_and_its_splits_differ():
    texts = [ptb.load("synthetic", "characters", split) for split in ("train", "valid", "test")]
    assert len({text.vocabulary for text in texts}) == 1
    assert all(int(text.tokens.max()) < len(text.vocabulary) for text in texts)
    assert not torch.equal(texts[1].tokens[:50], texts[2].tokens[:50])
    assert torch.equal(ptb.load("synthetic", "characters", "train").tokens, texts[0].tokens)


# Measures


def bits_of_a_text_read_symbol_by_symbol(experiment, tokens):
    """A second computation: plain LSTM equations, one symbol at a time, from the stored weights."""
    p = dict(experiment.learner.net.named_parameters())
    w_ih, w_hh = p["core.rnn.weight_ih_l0"], p["core.rnn.weight_hh_l0"]
    bias = p["core.rnn.bias_ih_l0"] + p["core.rnn.bias_hh_l0"]
    h = c = torch.zeros(w_hh.shape[1], dtype=torch.float64)
    total = 0.0
    for here, following in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        i, f, g, o = (w_ih @ p["encoder.weight"][here] + w_hh @ h + bias).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        logits = p["readout.weight"] @ h + p["readout.bias"]
        total -= math.log2(logits.exp()[following] / logits.exp().sum())
    return total / (len(tokens) - 1)


def test_bits_per_character_match_a_second_computation_and_carry_the_state():
    experiment = ptb.Experiment(small(arm="none", eval_columns=1, valid_tokens=40))
    experiment.learner.net.double()
    for parameter in experiment.learner.net.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    with torch.no_grad():
        expected = bits_of_a_text_read_symbol_by_symbol(experiment, experiment.text["valid"])
        pieces = [bits_of_a_text_read_symbol_by_symbol(experiment, part) for part in
                  (experiment.text["valid"][:21], experiment.text["valid"][20:])]  # fmt: skip
    for num_steps in (1, 7, 50):  # the state crosses windows, so their length does not matter
        assert experiment.evaluate("valid", num_steps) == pytest.approx(expected, abs=1e-12)
    cleared = (20 * pieces[0] + 19 * pieces[1]) / 39
    assert abs(cleared - expected) > 1e-3
    experiment.config = small(arm="none", eval_columns=2, valid_tokens=40)  # 2 columns of 20 and 19 targets
    assert experiment.evaluate("valid", 7) == pytest.approx(cleared, abs=1e-12)


def test_evaluation_leaves_training_alone():
    experiment = ptb.Experiment(small())
    experiment.update()
    before = [s.clone() for s in experiment.learner.state]
    experiment.evaluate("valid")
    assert all(torch.equal(a, b) for a, b in zip(before, experiment.learner.state, strict=True))


def test_the_test_takes_the_parameters_of_the_best_validation_and_gives_them_back():
    experiment = ptb.Experiment(small())
    for _ in range(4):
        experiment.update()
    experiment.evaluation()
    best = experiment.evaluate("test")
    experiment.learner.net["readout"].weight.data.normal_(std=30.0)  # ruined after the best validation
    for _ in range(4):
        experiment.update()
    ruined = experiment.evaluate("test")
    experiment.evaluation()
    assert len(experiment.curve) == 2 and experiment.curve[1]["bits"] > experiment.curve[0]["bits"]
    assert experiment.curve[0]["tokens"] == 4 * 3 * 4
    assert experiment.test() == best != ruined and experiment.evaluate("test") == ruined


CURVE = [
    {"tokens": 100.0, "seconds": 1.0, "bits": 3.0},
    {"tokens": 200.0, "seconds": 3.0, "bits": 2.0},
    {"tokens": 300.0, "seconds": 5.0, "bits": 2.5},
    {"tokens": 400.0, "seconds": 7.0, "bits": 1.5},
]


def results_of(curves):
    return {
        name: {
            "test_bits": curve[-1]["bits"],
            "test_perplexity": 2.0 ** curve[-1]["bits"],
            "best_valid_bits": min(point["bits"] for point in curve),
            "seconds": curve[-1]["seconds"],
            "curve": curve,
        }
        for name, curve in curves.items()
    }


def test_ratios_are_of_tokens_and_of_seconds_to_the_same_bits():
    settings = {key: value for key, value in SMALL.items() if key not in ("window", "dataset")}
    cells = ("none@5", "none@20", "none@40", "dni_aux@5", "dni@8")
    matrix = common.members(ptb.PtbConfig, cells, (0,), settings)
    faster = [{"tokens": 50.0, "seconds": 2.0, "bits": 3.0}, {"tokens": 150.0, "seconds": 6.0, "bits": 1.0}]
    curves = {"none-5": CURVE[:2], "none-20": CURVE, "none-40": faster, "dni_aux-5": faster, "dni-8": CURVE[:3]}
    results = results_of({f"{name}-seed0": curve for name, curve in curves.items()})
    summary = ptb.summarize(matrix, results)
    assert [row["published"] for row in summary["cells"]] == [1.37, 1.35, 1.34, 1.35, 1.34]
    found = {(f"{r['arm']}@{r['window']}", r["baseline"], r["threshold_bits"]): r for r in summary["ratios"]}
    # To the bits that both got to, over window 20 and over the longest; and to the published bits, where the baseline came to them or a
    # ratio was published.
    assert set(found) == {
        ("none@5", "none@20", 2.0), ("none@40", "none@20", 1.5), ("dni_aux@5", "none@20", 1.5), ("dni@8", "none@20", 2.0),
        ("none@5", "none@40", 2.0), ("none@20", "none@40", 1.5), ("dni_aux@5", "none@40", 1.0), ("dni@8", "none@40", 2.0),
        ("dni_aux@5", "none@20", 1.35), ("dni@8", "none@40", 1.34), ("dni_aux@5", "none@40", 1.34),
    }  # fmt: skip
    aux = found["dni_aux@5", "none@20", 1.5]
    assert aux["data_ratio"] == pytest.approx(125 / 400) and aux["time_ratio"] == pytest.approx(5 / 7)
    assert aux["published_data_ratio"] is None
    headline = found["dni_aux@5", "none@20", 1.35]
    assert (headline["published_data_ratio"], headline["published_time_ratio"]) == (0.58, 0.5)
    assert headline["data_ratio"] is None  # window 20 never came to 1.35
    assert found["dni@8", "none@40", 1.34]["published_time_ratio"] == 0.5
    assert found["dni_aux@5", "none@40", 1.34]["data_ratio"] == 1.0
    assert "| dni_aux | 5 | none@20 | 1.5 | 0.312 | - | 0.714 | - |" in ptb.table(summary)
    assert "| dni_aux | 5 | none@20 | 1.35 | - | 0.58 | - | 0.5 |" in ptb.table(summary)
    asked = [r for r in ptb.summarize(matrix, results, threshold_bits=1.6)["ratios"] if r["threshold_bits"] == 1.6]
    by_cell = {(f"{r['arm']}@{r['window']}", r["baseline"]): r["data_ratio"] for r in asked}
    assert by_cell["none@5", "none@20"] is None and len(asked) == 8
    assert by_cell["dni_aux@5", "none@20"] == pytest.approx(120 / 390)


def test_the_papers_headline_can_be_printed():
    """58 % of the data, half the time, against window 20 and to 1.35 bits."""
    paper = ptb.plan(["--preset", "paper", "--seeds", "0"]).matrix

    def curve(share):
        return [{"tokens": share * t, "seconds": share * t, "bits": bits} for t, bits in ((100.0, 1.45), (200.0, 1.25))]

    curves = {member.name: curve(0.5 if member.cell == common.Cell("dni_aux", 5) else 1.0) for member in paper}
    table = ptb.table(ptb.summarize(paper, results_of(curves)))
    assert "| dni_aux | 5 | none@20 | 1.35 | 0.5 | 0.58 | 0.5 | 0.5 |" in table
    assert "| dni | 8 | none@40 | 1.34 | 1 | - | 1 | 0.5 |" in table


def test_without_a_baseline_there_are_no_ratios():
    settings = {key: value for key, value in SMALL.items() if key != "window"}
    matrix = common.members(ptb.PtbConfig, ("dni@5",), (0,), settings)
    summary = ptb.summarize(matrix, results_of({"dni-5-seed0": CURVE}))
    assert summary["ratios"] == [] and "Ratios" not in ptb.table(summary)


# Program


@pytest.mark.parametrize("arm", ["none", "dni", "dni_aux"])
def test_a_resumed_run_equals_one_that_never_stopped(arm, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    result = ptb.run(small(arm=arm), whole, tensorboard=False)
    ptb.run(small(arm=arm, num_steps=24), pieces, tensorboard=False)
    with open(pieces / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "train/bits": 9.0}\n{"st')  # what a run that is cut off leaves
    resumed = ptb.run(small(arm=arm), pieces, resume=True, tensorboard=False)
    assert without_seconds(resumed) == without_seconds(result) and rows(pieces) == rows(whole)
    assert len(resumed["curve"]) == 4
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True)["learner"]["net"] for folder in (whole, pieces)]
    assert all(torch.equal(saved[0][key], value) for key, value in saved[1].items())


def test_the_smoke_preset_learns_and_writes_everything(tmp_path, capsys):
    ptb.main(["--preset", "smoke", "--run-folder", str(tmp_path), "--threshold-bits", "2.2"])
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["arm"], row["window"]) for row in summary["cells"]] == [
        ("none", 3), ("none", 6), ("dni", 3), ("dni_aux", 3),
    ]  # fmt: skip
    assert all(row["mean"] < 2.0 for row in summary["cells"])  # a memoryless model of this text needs more
    assert [(row["arm"], row["baseline"], row["threshold_bits"]) for row in summary["ratios"]] == [
        (arm, "none@6", 2.2) for arm in ("none", "dni", "dni_aux")
    ]
    assert all(row["data_ratio"] > 0 < row["time_ratio"] for row in summary["ratios"]) and "wall-clock ratio" in shown
    folder = tmp_path / "dni_aux-3-seed0"
    found = rows(folder)
    assert {"train/bits", "critic/cosine", "auxiliary/loss"} <= found[0].keys()
    assert [row["step"] for row in found if "valid/bits" in row] == [120, 240, 360, 480, 600]
    assert all(row["valid/perplexity"] == 2 ** row["valid/bits"] for row in found if "valid/bits" in row)
    assert list(folder.glob("events.out.tfevents.*"))


def test_a_run_that_diverges_is_a_row_that_says_so(tmp_path, capsys):
    arguments = ["--preset", "smoke", "--cells", "none@3", "dni@3", "--num-steps", "60", "--learning-rate", "1e30"]
    for level in ("characters", "words"):
        ptb.main([*arguments, "--level", level, "--run-folder", str(tmp_path / level), "--no-tensorboard"])
        shown = capsys.readouterr().out
        assert "| none | 3 | diverged | - | - |" in shown and "| dni | 3 | diverged | - | - |" in shown
        row, _ = json.loads((tmp_path / level / "summary.json").read_text())["cells"]
        assert row["per_seed"] == {"0": None} and row["mean"] is None and row["test_perplexity"] is None
    for bits in (5e30, 1024.0, math.inf):
        assert ptb.perplexity(bits) == math.inf
    assert math.isnan(ptb.perplexity(math.nan)) and ptb.perplexity(3.0) == 8.0


def test_one_diverged_seed_leaves_the_others_their_rows(tmp_path):
    settings = {key: value for key, value in SMALL.items() if key != "window"}
    matrix = common.members(ptb.PtbConfig, ("none@3", "none@20"), (0, 1), settings)
    results = results_of({member.name: CURVE for member in matrix})
    nothing = dict.fromkeys(("test_bits", "test_perplexity", "best_valid_bits"))
    results["none-3-seed1"] |= {**nothing, "curve": [{**point, "bits": None} for point in CURVE]}
    summary = ptb.summarize(matrix, results)
    assert [row["mean"] for row in summary["cells"]] == [None, 1.5]
    (ratio,) = summary["ratios"]
    assert ratio["threshold_bits"] is ratio["data_ratio"] is ratio["time_ratio"] is None
    assert "| none | 3 | 1.500 diverged | - | - |" in ptb.table(summary)


def test_without_a_validation_that_is_a_number_there_is_no_test():
    experiment = ptb.Experiment(small())
    experiment.learner.net["readout"].weight.data.fill_(math.nan)
    experiment.step = 3
    assert math.isnan(experiment.evaluation()["valid/bits"]) and experiment.best == {}
    assert math.isnan(experiment.result()["test_bits"])


def test_words_are_measured_in_perplexity(tmp_path, capsys):
    arguments = ["--preset", "smoke", "--level", "words", "--cells", "dni@3", "--num-steps", "240"]
    ptb.main([*arguments, "--run-folder", str(tmp_path), "--no-tensorboard"])
    (row,) = json.loads((tmp_path / "summary.json").read_text())["cells"]
    assert row["test_perplexity"] == pytest.approx(2.0 ** row["mean"]) and row["published"] is None
    assert 7.0 < row["test_perplexity"] < 10.0  # eight words, drawn evenly
    assert "test perplexity" in capsys.readouterr().out


def test_presets_state_the_papers_settings():
    paper = {key: value for key, value in ptb.PRESETS["paper"].items() if key not in ("cells", "seeds", "arms")}
    assert ptb.PtbConfig(**paper).hidden_size == 1024
    for name, preset in ptb.PRESETS.items():
        settings = {key: value for key, value in preset.items() if key not in ("cells", "seeds", "jobs", "arms")}
        common.members(ptb.PtbConfig, preset["cells"], preset["seeds"], settings, preset.get("arms"))
        assert name == "smoke" or len(preset["seeds"]) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "letters"], "level: found 'letters', allowed characters, words"),
        (["--eval-columns", "0"], "eval_columns: found 0, allowed 1 or more"),
        (["--valid-tokens", "1"], "valid_tokens: found 1, allowed 2 or more"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        ptb.main([*arguments, "--run-folder", str(tmp_path), "--no-tensorboard"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit):
        ptb.main(["--dataset", "ptb", "--run-folder", str(tmp_path / "run")])
    assert "nowhere: no such folder" in capsys.readouterr().err
