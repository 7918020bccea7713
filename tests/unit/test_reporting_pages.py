from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from kubegraft.evaluation.calibration import reliability_bins
from kubegraft.evaluation.metrics import Answers
from kubegraft.reporting import html, plots, svg

HOSTILE = "<script>alert(1)</script> & \"'"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("umlaut ü", "umlaut ü", id="unicode"),
        pytest.param(b"caf\xe9".decode("utf-8", "surrogateescape"), r"caf\xe9", id="no-utf-8"),
        pytest.param("lone \ud800", r"lone \ud800", id="lone-surrogate"),
        pytest.param("evil\u202egpj.exe", r"evil\u202egpj.exe", id="turned-direction"),
        pytest.param("bell\x07", r"bell\x07", id="control"),
    ],
)
def test_any_file_name_can_be_shown(name, shown):
    assert html.printable(name) == shown
    html.printable(name).encode("utf-8")


def evaluation_page(**changes):
    return (
        html._environment()
        .from_string(
            '{% extends "base.html" %}{% import "parts.html" as parts %}'
            "{% block title %}{{ name }}{% endblock %}"
            "{% block content %}{{ parts.stat(name, 1) }}{{ parts.table([name], [[name]]) }}"
            '{{ parts.facts([(name, name)]) }}{{ parts.warnings([name]) }}<i title="{{ name }}"></i>{% endblock %}'
        )
        .render(version="1", **changes)
    )


def test_names_are_escaped_everywhere():
    page = evaluation_page(name=HOSTILE)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 9
    assert f'title="{Markup.escape(HOSTILE)}"' in page


def test_pages_forbid_scripts_and_the_network():
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in evaluation_page(name="x")


def test_a_name_that_the_template_needs_must_be_given():
    with pytest.raises(UndefinedError):
        evaluation_page()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(4.24, "4.2 s"), (185, "3 min 05 s"), (3725, "1 h 02 min")],
    ids=str,
)
def test_durations_read_well(value, shown):
    assert html.duration(value) == shown


def texts(markup):
    return [element.text for element in ET.fromstring(markup).iter("{http://www.w3.org/2000/svg}text")]


def test_learning_curves_show_both_phases_and_their_kept_epochs():
    phases = [
        {
            "phase": phase,
            "epochs": [{"validation_accuracy": value, "train_accuracy": None} for value in values],
            "best_epoch": best,
            "start": {"validation_accuracy": start},
        }
        for phase, values, best, start in [("train_head", [0.5, 0.9], 1, 0.1), ("fine_tune", [0.7], -1, 0.9)]
    ]
    curves = plots.phase_curves(phases, "accuracy")
    markup = plots.learning_curves(curves, "accuracy", fraction=True)
    assert {"head training", "fine-tuning", "kept"} <= set(texts(markup))
    assert curves[0].start is None  # a random head's start would flatten all that follows
    assert markup.count("kept: epoch") == 2
    assert "kept: epoch 0, 0.9" in markup  # nothing beat what fine-tuning started from


def test_a_head_that_was_solved_for_is_drawn_over_its_decays():
    epochs = [{"validation_accuracy": 0.9, "weight_decay": decay} for decay in (1.0, 0.1)]
    phase = {"phase": "train_head", "solver": "lbfgs", "epochs": epochs, "best_epoch": 1, "start": {}}
    markup = plots.learning_curves(plots.phase_curves([phase], "accuracy"), "accuracy")
    assert "head, decay falling" in texts(markup)
    assert "kept: weight decay 0.1, 0.9" in markup


@pytest.mark.parametrize("values", [[], [float("nan")], [0.5], [1.0, 1.0], [1e-9, 3e8]], ids=str)
def test_learning_curves_of_any_values_are_valid_drawings(values):
    ET.fromstring(plots.learning_curves([plots.Curve("head", values, values)], "loss"))


def test_a_phase_without_epochs_shows_where_it_started():
    skipped = plots.Curve("fine-tuning", [], [], start=0.9, best_epoch=-1)
    markup = plots.learning_curves([plots.Curve("head", [0.5], [0.6]), skipped], "accuracy", fraction=True)
    assert "kept: epoch 0, 0.9" in markup


@pytest.mark.parametrize("num_classes", [2, 11, 60])
def test_a_confusion_matrix_draws_every_filled_cell_with_its_names(num_classes):
    names = [f"{HOSTILE} {number}" for number in range(num_classes)]
    matrix = np.eye(num_classes, dtype=np.int64) * 7
    matrix[0, 1] = 2
    markup = plots.confusion_heat_map(matrix, names)
    tips = [element.text for element in ET.fromstring(markup).iter("{http://www.w3.org/2000/svg}title")]
    assert f"2 of 9 {names[0]} called {names[1]}" in tips
    assert sum(f"7 of 7 {name} called {name}" in tips for name in names) == num_classes - 1


def test_too_many_classes_for_a_matrix_draw_none():
    assert plots.confusion_heat_map(np.eye(61, dtype=np.int64), ["a"] * 61) is None


def test_a_class_without_test_images_has_an_empty_row():
    ET.fromstring(plots.confusion_heat_map(np.array([[3, 0], [0, 0]]), ["a", "b"]))


def test_a_reliability_diagram_tells_each_bin():
    bins = reliability_bins(Answers.of([[0.9, 0.1]] * 4 + [[0.6, 0.4]], [0, 0, 0, 1, 0]), 10)
    markup = plots.reliability_diagram(bins)
    ET.fromstring(markup)
    assert "4 images: confidence 90.0%, accuracy 75.0%" in markup
    assert "1 images: confidence 60.0%, accuracy 100.0%" in markup


def test_bars_are_cut_to_what_can_be_read():
    bars = [plots.Bar(f"{HOSTILE} {number}", 0.5, 0.4, 0.6) for number in range(200)]
    markup = plots.horizontal_bars(bars, "recall")
    ET.fromstring(markup)
    assert f"{Markup.escape(HOSTILE)} 79" in markup
    assert f"{Markup.escape(HOSTILE)} 80:" not in markup


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.93, 0.981), (0.2, 12), (-3, 5e6), (1e-5, 2e-5)], ids=str
)
def test_ticks_are_few_and_inside(low, high):
    found = svg.ticks(low, high)
    assert 3 <= len(found) <= 9
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in found)
