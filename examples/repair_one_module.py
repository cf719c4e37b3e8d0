"""Which module is to blame, and can it be repaired alone? On digits: python examples/repair_one_module.py"""

import revprop
from revprop.datasets import load_digits
from revprop.networks import NETWORKS

data = load_digits()
train, test = data.train.tensors(), data.test.tensors()
model = NETWORKS["digits"](seed=0)
revprop.train_baseline(model, train, test, revprop.Training(epochs=40, batch_size=64, device="cpu"))

graph = revprop.trace(model, train[0][:2])
print(revprop.diagnose(graph, [test]))  # which layer has to change least to get its wrong answers right?

rec = revprop.reconstruct(graph, *test, to="conv2")  # wanted features of one layer: the nearest that give the label
print(rec.certificates["conv2"])

for method in ("bp", "fr"):
    result = revprop.post_train(
        graph, train, start="conv2", stop="fc1", method=method, alpha=0.5, validation=test, device="cpu"
    )
    print(method, [f"{100 * epoch.accuracy:.2f}" for epoch in result.history])
