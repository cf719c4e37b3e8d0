"""A network with skip connections, its own checkpoint or none: what would a layer have had to say for another answer?

python examples/nearest_features_of_a_resnet.py [weights.safetensors]
"""

import sys

import torch

import revprop
from revprop.networks import load_weights, resnet

model = resnet.resnet20(seed=0).eval()
if len(sys.argv) > 1:
    load_weights(model, sys.argv[1])
x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
graph = revprop.trace(model, x)
print(revprop.check(graph).covered, "- every operator of", graph)

answer = graph(x).argmax(1)
other = (answer + 1) % 10
for layer in ("layer1", "layer2.1.conv1", "layer3"):
    rec = revprop.reconstruct(graph, x, other, to=layer)
    print(f"{layer:15s} {rec.certificates[layer]}")
