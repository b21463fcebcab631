"""What a trained run is for: python use.py FOLDER"""

import sys

import torch

import fobmaml

run = fobmaml.load_run(sys.argv[1], trust=True)  # the classes that it names are this project's
task = run.data.sample("test", 1, torch.Generator().manual_seed(1))
network = run.adapt(task.support_x[0], task.support_y[0])  # a tones.network.Listener, as any other
right = run.predict(network, task.query_x[0]) == task.query_y[0]
print(f"{type(network).__name__} after {run.step} meta-steps: {right.double().mean():.0%} of a new task is right")
