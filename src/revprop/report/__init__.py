"""Finished runs as tables, figures and one self-contained page. Formats and averages; computes nothing else."""

from revprop.report.aggregation import LayerSummary, RunGroup, group_runs, summarise_diagnosis
from revprop.report.figures import accuracy_curves, deviation_bars, discrepancy_maps, figure_to_png_uri, figure_to_svg
from revprop.report.page import Section, write_page
from revprop.report.published import PUBLISHED, PUBLISHED_EPOCHS, PublishedRow, PublishedTable
from revprop.report.study import reconstruction_table, study_tables, write_figures, write_markdown, write_report
from revprop.report.tables import Table, diagnosis_table, post_training_table

__all__ = [
    "PUBLISHED",
    "PUBLISHED_EPOCHS",
    "LayerSummary",
    "PublishedRow",
    "PublishedTable",
    "RunGroup",
    "Section",
    "Table",
    "accuracy_curves",
    "deviation_bars",
    "diagnosis_table",
    "discrepancy_maps",
    "figure_to_png_uri",
    "figure_to_svg",
    "group_runs",
    "post_training_table",
    "reconstruction_table",
    "study_tables",
    "summarise_diagnosis",
    "write_figures",
    "write_markdown",
    "write_page",
    "write_report",
]
