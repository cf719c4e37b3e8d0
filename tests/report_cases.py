"""Rows of post-training studies whose results are known."""

import itertools


def make_run(method="fr", layers=(0, 1), seed=0, accuracy=0.6, epochs=(1, 5, 10), memory=8e6, baseline=0.6, **settings):
    """One row; `accuracy` is that of every epoch, or one per epoch."""
    values = accuracy if isinstance(accuracy, tuple) else (accuracy,) * len(epochs)
    return {
        "settings": {
            **{"kind": "post-training", "data": "cifar10-jpeg", "network": "cifar10"},
            **{"start": f"layer{layers[0]}", "stop": f"layer{layers[1]}", "method": method, "seed": seed, **settings},
        },
        "l_start": layers[0],
        "l_stop": layers[1],
        "parameters": 380,
        "peak_memory_bytes": memory,
        "seconds": 2.0 * len(epochs),
        "target_seconds": 0.5,
        "baseline_accuracy": baseline,
        "history": [
            {"epoch": 0, "accuracy": baseline, "seconds": 0.0},
            *({"epoch": e, "accuracy": value, "seconds": 2.0} for e, value in zip(epochs, values, strict=True)),
        ],
    }


def study(gains, seeds=6, method="fr", **settings):
    """Rows of BP and of another method that gains some points on it, by layers, 0.1 more or less from seed to seed."""
    rows = []
    for (layers, gain), seed in itertools.product(gains.items(), range(seeds)):
        rows.append(make_run("bp", layers, seed, 0.61))
        rows.append(make_run(method, layers, seed, 0.61 + (gain + 0.1 * (-1) ** seed) / 100, **settings))
    return rows
