"""Training recipes by dataset and model, each with the command, results and time to expect.

The first recipe of each is the default. Accuracies are in percent of the test split, for seeds 0
and 1; times are of training one model on 2 CPU cores.
"""

from experiments.train import TrainConfig

RECIPES: dict[tuple[str, str], dict[str, TrainConfig]] = {
    # python -m experiments one_shot
    # 98.35 and 98.90, with --bias 97.80 and 98.08; 2 s.
    ("digits", "mlpnet"): {
        "short": TrainConfig(epochs=20, batch_size=64, learning_rate=0.1, momentum=0.9),
    },
    # python -m experiments one_shot --dataset mnist
    # 97.68 and 97.78, with --bias 97.73 and 97.75; 20 s. The recipe of Singh & Jaggi 2020, MLPNet.
    ("mnist", "mlpnet"): {
        "paper": TrainConfig(epochs=10, batch_size=64, learning_rate=0.01, momentum=0.5),
    },
    ("cifar10", "vgg11"): {
        "short": TrainConfig(
            epochs=20,
            batch_size=128,
            learning_rate=0.05,
            momentum=0.9,
            weight_decay=5e-4,
            one_cycle=True,
            augment=True,
        ),
        # Singh & Jaggi 2020, VGG11.
        "paper": TrainConfig(
            epochs=300,
            batch_size=128,
            learning_rate=0.05,
            momentum=0.9,
            weight_decay=5e-4,
            drops=tuple((epoch, 0.5) for epoch in range(30, 300, 30)),
            augment=True,
        ),
    },
    ("cifar10", "resnet18"): {
        "short": TrainConfig(
            epochs=20,
            batch_size=128,
            learning_rate=0.2,
            momentum=0.9,
            weight_decay=5e-4,
            one_cycle=True,
            augment=True,
        ),
        # Singh & Jaggi 2020, ResNet18.
        "paper": TrainConfig(
            epochs=300,
            batch_size=256,
            learning_rate=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            drops=((150, 0.1), (250, 0.1)),
            augment=True,
        ),
    },
}
