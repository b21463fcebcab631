"""Meta-trains the networks that the interactive page adapts to a sinusoid: python scripts/explorer_sinusoid.py [FOLDER]

Takes two minutes and writes FOLDER/explorer_sinusoid.json, by default in results/. iMAML is not among them: its inner
problem asks for more than these few steps: at outer rates of 0.03 to 0.3 training diverged, or with its authors'
damping stayed poor.
"""

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import Missing, folder_given
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fobmaml import Learner
from fobmaml.estimators import FOMAML, MAML, Estimator, Reptile, Symmetric, estimate
from fobmaml.files import write_json
from fobmaml.models import MLP
from fobmaml.optim import SNGDM
from fobmaml.run.provenance import provenance
from fobmaml.solvers import GradientDescent, InnerProblem
from fobmaml.tasks import Sinusoid

SIZES = (1, 32, 32, 1)
STEPS, TASKS, OUTER_LR, INNER_LR = 3000, 8, 0.1, 0.01
TRAINED_STEPS, TESTED_STEPS, TESTED_TASKS = 5, (0, 5, 10, 50), 400
UNTRAINED = "untrained"


def estimators() -> dict[str, Estimator]:
    """Reptile as its authors have it, on batches of half of a task's examples, with twice as many and as long steps."""
    gd = GradientDescent(TRAINED_STEPS, INNER_LR)
    return {
        "maml": MAML(gd),
        "fomaml": FOMAML(gd),
        "reptile": Reptile(GradientDescent(2 * TRAINED_STEPS, 2 * INNER_LR, batch=10)),
        "symmetric": Symmetric(gd, lam=0.5, nu=0.05),
    }


def learner() -> Learner:
    """The same start for all."""
    torch.manual_seed(0)
    return Learner(MLP((1,), 1, width=SIZES[1], depth=len(SIZES) - 2), mse_loss)


def train(estimator: Estimator, steps: int = STEPS) -> Tensor:
    """θ [P] after so many steps of SNGDM, their length falling to zero by a cosine."""
    model, source = learner(), Sinusoid()
    theta = nn.Parameter(model.theta())
    optimizer = SNGDM([theta], lr=OUTER_LR)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tasks = source.sample("train", TASKS, generator).to(dtype=torch.float32).keyed(generator)
        theta.grad = estimate(estimator, model, theta.detach(), tasks, diagnose=False).gradient
        for group in optimizer.param_groups:
            group["lr"] = OUTER_LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
    return theta.detach()


def query_loss(theta: Tensor, steps: int, count: int = TESTED_TASKS) -> float:
    """The mean query loss of new tasks after so many steps of adaptation."""
    tasks = Sinusoid().sample("test", count, torch.Generator().manual_seed(STEPS)).to(dtype=theta.dtype)
    model = learner()
    problem = InnerProblem(model, theta, tasks, 0.0)
    phi = GradientDescent(steps, INNER_LR).solve(problem).phi if steps else problem.theta
    return float(model.query_loss(phi, tasks).mean())


def packed(values: Tensor) -> str:
    """float32, little endian, in base64."""
    return base64.b64encode(values.float().contiguous().numpy().astype("<f4").tobytes()).decode()


def unpacked(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())


def networks(folder: Path) -> dict[str, Any]:
    """What ``main`` has written."""
    path = folder / "explorer_sinusoid.json"
    if not path.exists():
        raise Missing(f"{path} is missing: python scripts/explorer_sinusoid.py makes it")
    return json.loads(path.read_text())


def main() -> None:
    torch.set_num_threads(1)
    found = {UNTRAINED: learner().theta()}
    for name, estimator in estimators().items():
        found[name] = train(estimator)
        print(name, *(f"{query_loss(found[name], steps):.3f}" for steps in TESTED_STEPS), flush=True)
    write_json(
        folder_given() / "explorer_sinusoid.json",
        {
            "command": "python scripts/explorer_sinusoid.py",
            "what": f"a network {'-'.join(map(str, SIZES))} with SiLU, meta-trained on sinusoids by each method",
            "settings": {
                "steps": STEPS,
                "meta_batch": TASKS,
                "optimizer": "sngdm",
                "optimizer.lr": OUTER_LR,
                "inner_lr": INNER_LR,
                "inner_steps": TRAINED_STEPS,
                "dataset.shots": Sinusoid().shots,
                "eval.tasks": TESTED_TASKS,
            },
            "sizes": SIZES,
            "test_loss": {
                name: {str(steps): query_loss(theta, steps) for steps in TESTED_STEPS} for name, theta in found.items()
            },
            "parameters": {name: packed(theta) for name, theta in found.items()},
            "provenance": provenance(),
        },
    )


if __name__ == "__main__":
    main()
