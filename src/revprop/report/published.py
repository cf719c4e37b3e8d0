"""The published numbers that ours are held against: Tables 1 and 2 of the paper on FR post-training (FR-PT).

As printed there, and nothing derived from them: test accuracy in percent, mean and standard deviation over ten runs,
after 1, 5 and 10 epochs, from one baseline per data set.
"""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED_EPOCHS = (1, 5, 10)


@dataclass(frozen=True)
class PublishedRow:
    """One line of a published table: the layers after `l_start` up to `l_stop`, trained by one method.

    Args:
        method: "bp" or "fr".
        l_start: the number of the last frozen layer in front (0: none).
        l_stop: the number of the last trained layer.
        parameters: how many parameters are trained.
        memory_mb: GPU memory, in the paper's MB.
        mean: test accuracy in percent after 1, 5 and 10 epochs, mean over the runs.
        std: the standard deviations of the same.

    Example:
        >>> PUBLISHED["cifar10"].rows[13].mean
        (62.393, 62.693, 62.982)
    """

    method: str
    l_start: int
    l_stop: int
    parameters: int
    memory_mb: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class PublishedTable:
    """One published table.

    Args:
        number: its number in the paper.
        baseline_accuracy: test accuracy of the network before post-training, in percent.
        alpha: the share of the reconstruction loss in FR's loss.
        runs: how many runs a line is the mean of.
        rows: its lines, in the paper's order.

    Example:
        >>> PUBLISHED["mnist"].baseline_accuracy, len(PUBLISHED["mnist"].rows)
        (97.62, 12)
    """

    number: int
    baseline_accuracy: float
    alpha: float
    runs: int
    rows: tuple[PublishedRow, ...]

    def means(self) -> dict[tuple[str, int, int], tuple[float, float, float]]:
        """Give the means by (method, l_start, l_stop), the form that `post_training_table` takes.

        Returns:
            Test accuracy in percent after 1, 5 and 10 epochs for every line.

        Example:
            >>> PUBLISHED["cifar10"].means()["bp", 0, 1]
            (62.474, 62.568, 62.667)
        """
        return {(row.method, row.l_start, row.l_stop): row.mean for row in self.rows}


PUBLISHED = {
    "mnist": PublishedTable(
        number=1,
        baseline_accuracy=97.62,
        alpha=0.1,
        runs=10,
        rows=(
            PublishedRow("bp", 0, 1, 52, 7.93, (97.693, 97.671, 97.719), (0.035, 0.062, 0.054)),
            PublishedRow("fr", 0, 1, 52, 8.23, (97.682, 97.688, 97.692), (0.042, 0.037, 0.039)),
            PublishedRow("bp", 0, 2, 256, 7.93, (97.703, 97.707, 97.748), (0.031, 0.038, 0.023)),
            PublishedRow("fr", 0, 2, 256, 8.20, (97.682, 97.707, 97.739), (0.040, 0.026, 0.021)),
            PublishedRow("bp", 1, 2, 204, 5.37, (97.700, 97.712, 97.694), (0.022, 0.018, 0.022)),
            PublishedRow("fr", 1, 2, 204, 5.64, (97.695, 97.697, 97.716), (0.020, 0.018, 0.028)),
            PublishedRow("bp", 0, 3, 2826, 7.96, (97.736, 97.855, 97.913), (0.030, 0.054, 0.062)),
            PublishedRow("fr", 0, 3, 2826, 7.98, (97.676, 97.744, 97.781), (0.036, 0.047, 0.058)),
            PublishedRow("bp", 1, 3, 2774, 5.40, (97.727, 97.833, 97.901), (0.065, 0.072, 0.047)),
            PublishedRow("fr", 1, 3, 2774, 5.41, (97.695, 97.748, 97.791), (0.045, 0.057, 0.031)),
            PublishedRow("bp", 2, 3, 2570, 5.39, (97.718, 97.826, 97.852), (0.046, 0.023, 0.036)),
            PublishedRow("fr", 2, 3, 2570, 5.41, (97.692, 97.742, 97.741), (0.047, 0.023, 0.034)),
        ),
    ),
    "cifar10": PublishedTable(
        number=2,
        baseline_accuracy=62.55,
        alpha=0.1,
        runs=10,
        rows=(
            PublishedRow("bp", 0, 1, 380, 17.43, (62.474, 62.568, 62.667), (0.173, 0.256, 0.244)),
            PublishedRow("fr", 0, 1, 380, 20.45, (62.336, 62.584, 62.722), (0.326, 0.472, 0.288)),
            PublishedRow("bp", 0, 2, 840, 17.43, (62.546, 62.569, 62.736), (0.202, 0.321, 0.226)),
            PublishedRow("fr", 0, 2, 840, 19.60, (62.371, 62.420, 62.600), (0.323, 0.183, 0.241)),
            PublishedRow("bp", 1, 2, 460, 12.01, (62.698, 62.674, 62.622), (0.155, 0.109, 0.084)),
            PublishedRow("fr", 1, 2, 460, 13.94, (62.667, 62.684, 62.603), (0.085, 0.095, 0.122)),
            PublishedRow("bp", 0, 3, 2205, 17.45, (62.294, 62.717, 62.749), (0.399, 0.253, 0.177)),
            PublishedRow("fr", 0, 3, 2205, 19.46, (62.465, 62.637, 62.755), (0.254, 0.283, 0.386)),
            PublishedRow("bp", 1, 3, 1825, 12.03, (62.662, 62.719, 62.775), (0.125, 0.141, 0.203)),
            PublishedRow("fr", 1, 3, 1825, 13.79, (62.576, 62.696, 62.653), (0.102, 0.143, 0.103)),
            PublishedRow("bp", 2, 3, 1365, 12.02, (62.564, 62.593, 62.498), (0.146, 0.183, 0.114)),
            PublishedRow("fr", 2, 3, 1365, 13.08, (62.505, 62.543, 62.575), (0.102, 0.145, 0.161)),
            PublishedRow("bp", 0, 4, 33053, 17.81, (62.415, 62.654, 62.711), (0.375, 0.433, 0.549)),
            PublishedRow("fr", 0, 4, 33053, 19.65, (62.393, 62.693, 62.982), (0.313, 0.194, 0.215)),
            PublishedRow("bp", 1, 4, 32673, 12.38, (62.451, 62.700, 62.682), (0.265, 0.184, 0.177)),
            PublishedRow("fr", 1, 4, 32673, 13.99, (62.481, 62.856, 62.883), (0.148, 0.242, 0.120)),
            PublishedRow("bp", 2, 4, 32213, 12.37, (62.383, 62.639, 62.533), (0.236, 0.220, 0.199)),
            PublishedRow("fr", 2, 4, 32213, 13.28, (62.544, 62.656, 62.587), (0.185, 0.143, 0.109)),
            PublishedRow("bp", 3, 4, 30848, 12.35, (62.526, 62.691, 62.715), (0.256, 0.084, 0.122)),
            PublishedRow("fr", 3, 4, 30848, 13.26, (62.535, 62.703, 62.692), (0.143, 0.091, 0.145)),
            PublishedRow("bp", 0, 5, 34343, 17.95, (62.137, 62.588, 62.583), (0.244, 0.442, 0.319)),
            PublishedRow("fr", 0, 5, 34343, 19.51, (62.239, 62.631, 62.878), (0.305, 0.230, 0.198)),
            PublishedRow("bp", 1, 5, 33963, 12.40, (62.369, 62.807, 62.582), (0.290, 0.305, 0.112)),
            PublishedRow("fr", 1, 5, 33963, 13.84, (62.340, 62.695, 62.719), (0.239, 0.143, 0.200)),
            PublishedRow("bp", 2, 5, 33503, 12.39, (62.360, 62.612, 62.445), (0.215, 0.174, 0.190)),
            PublishedRow("fr", 2, 5, 33503, 13.13, (62.384, 62.586, 62.544), (0.197, 0.242, 0.163)),
            PublishedRow("bp", 3, 5, 32138, 12.37, (62.383, 62.579, 62.447), (0.109, 0.116, 0.149)),
            PublishedRow("fr", 3, 5, 32138, 13.11, (62.348, 62.568, 62.522), (0.188, 0.239, 0.170)),
            PublishedRow("bp", 4, 5, 1290, 12.02, (62.301, 62.365, 62.260), (0.152, 0.111, 0.071)),
            PublishedRow("fr", 4, 5, 1290, 12.76, (62.263, 62.309, 62.272), (0.104, 0.154, 0.053)),
        ),
    ),
}
