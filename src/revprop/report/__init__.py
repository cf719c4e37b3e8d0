"""Finished runs as tables, figures and one self-contained page: averages, paired comparisons, and how to read them."""

from revprop.report.ablation import Change, ablation_table, find_changes
from revprop.report.aggregation import LayerSummary, RunGroup, group_runs, summarise_diagnosis
from revprop.report.cell_tables import comparison_table, memory_table, published_table
from revprop.report.comparison import Best, Paired, best_setting, compare, compare_choices, correct, holm
from revprop.report.difference_figures import comparison_figure, difference_dots
from revprop.report.explanation import unit_words, write_explanation
from revprop.report.figures import accuracy_curves, deviation_bars, discrepancy_maps, figure_to_png_uri, figure_to_svg
from revprop.report.grid import Grid, Way, split_by_study
from revprop.report.information_figures import information_planes
from revprop.report.page import Section, write_page
from revprop.report.post_training_sections import post_training_sections
from revprop.report.published import PUBLISHED, PUBLISHED_EPOCHS, PublishedRow, PublishedTable
from revprop.report.racecar_figures import regenerated_inputs
from revprop.report.spectrum_figures import spectrum_pictures
from revprop.report.study import reconstruction_table, study_tables, write_figures, write_markdown, write_report
from revprop.report.summary import BestOfWay, best_of_ways, summary_table
from revprop.report.tables import Table, diagnosis_table, post_training_table
from revprop.report.verdict import best_verdicts, cell_verdicts, headline

__all__ = [
    "PUBLISHED",
    "PUBLISHED_EPOCHS",
    "Best",
    "BestOfWay",
    "Change",
    "Grid",
    "LayerSummary",
    "Paired",
    "PublishedRow",
    "PublishedTable",
    "RunGroup",
    "Section",
    "Table",
    "Way",
    "ablation_table",
    "accuracy_curves",
    "best_of_ways",
    "best_setting",
    "best_verdicts",
    "cell_verdicts",
    "compare",
    "compare_choices",
    "comparison_figure",
    "comparison_table",
    "correct",
    "deviation_bars",
    "diagnosis_table",
    "difference_dots",
    "discrepancy_maps",
    "figure_to_png_uri",
    "figure_to_svg",
    "find_changes",
    "group_runs",
    "headline",
    "holm",
    "information_planes",
    "memory_table",
    "post_training_sections",
    "post_training_table",
    "published_table",
    "reconstruction_table",
    "regenerated_inputs",
    "spectrum_pictures",
    "split_by_study",
    "study_tables",
    "summarise_diagnosis",
    "summary_table",
    "unit_words",
    "write_explanation",
    "write_figures",
    "write_markdown",
    "write_page",
    "write_report",
]
