"""The published tables of the robustness study as data: accuracies and scores in percent, parameters in millions.

Source: spec nas_adversarial_robustness section 6, tables 4.1 to 4.7.
"""

from typing import NamedTuple


class Attacked(NamedTuple):
    """A row of tables 4.1 to 4.5; `autopgd` is None where the table has no such column."""

    clean: float
    fgsm: float
    ffgsm: float
    pgd: float
    autopgd: float | None
    hrs: float


class Sized(NamedTuple):
    """A row of table 4.6."""

    params_m: float
    clean: float
    pgd: float
    pp_hrs: float


class Repeated(NamedTuple):
    """A row of table 4.7; standard deviations over four runs, 0 where there was a single one."""

    params_m: float
    clean: float
    pgd: float
    params_m_sd: float = 0.0
    clean_sd: float = 0.0
    pgd_sd: float = 0.0


HANDCRAFTED = ("ResNet-18", "ResNet-50", "DenseNet-121", "DenseNet-169", "VGG16-BN")


# Table 4.1: EfficientNet, ImageNet at 224x224, top-5.
EFFICIENTNET = {
    "B0": Attacked(91.35, 48.94, 42.8, 8.11, None, 14.89),
    "B4": Attacked(92.73, 66.73, 59.26, 16.99, None, 28.71),
    "B7": Attacked(91.57, 60.13, 48.48, 11.2, None, 19.96),
}


# Table 4.2: CIFAR-10, top-1.
CIFAR10 = {
    "ResNet-18": Attacked(93.48, 52.43, 48.33, 24.27, 23.13, 38.53),
    "ResNet-50": Attacked(94.38, 50.05, 45.78, 23.45, 22.35, 37.57),
    "DenseNet-121": Attacked(94.76, 50.94, 47.14, 24.06, 22.66, 38.38),
    "DenseNet-169": Attacked(94.74, 53.53, 49.47, 26.21, 24.35, 41.06),
    "VGG16-BN": Attacked(94.07, 52.42, 46.16, 20.03, 18.63, 33.03),
    "DARTS": Attacked(97.03, 58.53, 45.03, 7.09, 6.1, 13.21),
    "P-DARTS": Attacked(97.12, 58.67, 47.62, 9.31, 7.98, 16.99),
    "NSGA-Net": Attacked(96.94, 66.08, 56.16, 11.1, 9.82, 19.92),
    "ProxylessNAS": Attacked(97.92, 51.73, 58.38, 3.22, 4.24, 6.23),
    "PC-DARTS": Attacked(97.05, 60.55, 48.65, 9.84, 8.36, 17.87),
}


# Table 4.3: CIFAR-100, top-1.
CIFAR100 = {
    "ResNet-18": Attacked(63.87, 17.08, 17.12, 6.05, 5.39, 11.05),
    "ResNet-50": Attacked(73.09, 19.0, 18.12, 5.63, 5.16, 10.45),
    "DenseNet-121": Attacked(78.71, 22.9, 22.22, 7.28, 6.68, 13.33),
    "DenseNet-169": Attacked(82.44, 22.73, 21.66, 7.37, 6.9, 13.53),
    "VGG16-BN": Attacked(72.05, 17.09, 15.15, 4.27, 3.81, 8.06),
    "DARTS": Attacked(82.43, 24.91, 16.34, 2.32, 1.89, 4.51),
    "P-DARTS": Attacked(83.07, 27.69, 20.23, 3.09, 2.66, 5.96),
    "NSGA-Net": Attacked(85.44, 34.93, 24.1, 2.26, 1.94, 4.4),
    "PC-DARTS": Attacked(81.83, 26.22, 18.35, 2.93, 2.51, 5.66),
}


# Table 4.4: ImageNet, top-5. The table writes VGG16-BN as VGG16.
IMAGENET = {
    "ResNet-18": Attacked(89.08, 32.75, 18.03, 2.41, 21.65, 4.7),
    "ResNet-50": Attacked(92.86, 46.28, 26.22, 4.68, 20.93, 8.9),
    "DenseNet-121": Attacked(91.97, 56.2, 38.11, 6.932, 24.2, 12.89),
    "DenseNet-169": Attacked(92.81, 61.89, 44.22, 10.46, 27.15, 18.8),
    "VGG16-BN": Attacked(91.52, 33.34, 13.54, 1.55, 19.57, 3.05),
    "DARTS": Attacked(91.26, 54.41, 31.18, 2.94, 20.81, 5.7),
    "P-DARTS": Attacked(92.61, 55.53, 33.87, 4.11, 20.67, 7.86),
    "PC-DARTS": Attacked(92.49, 58.9, 37.86, 4.75, 21.52, 9.04),
    "ProxylessNAS": Attacked(92.54, 59.56, 39.69, 6.48, 22.28, 12.11),
    "DenseNAS-Large": Attacked(92.8, 47.91, 27.25, 2.97, 19.62, 5.76),
    "DenseNAS-R3": Attacked(93.81, 54.99, 32.11, 4.32, 19.94, 8.25),
}


# Table 4.5: Flowers-102, top-1.
FLOWERS = {
    "ResNet-18": Attacked(95.48, 54.33, 51.16, 11.23, 10.38, 20.1),
    "ResNet-50": Attacked(97.31, 53.97, 52.38, 11.36, 10.01, 20.34),
    "DenseNet-121": Attacked(97.19, 67.4, 58.61, 16.0, 13.8, 27.48),
    "DenseNet-169": Attacked(97.44, 69.11, 62.76, 18.56, 16.48, 31.18),
    "VGG16-BN": Attacked(95.24, 72.16, 66.06, 27.59, 26.74, 42.78),
    "DARTS": Attacked(95.97, 64.47, 59.95, 19.29, 18.19, 32.12),
    "P-DARTS": Attacked(95.12, 55.31, 51.16, 9.52, 8.55, 17.31),
    "NSGA-Net": Attacked(92.55, 40.05, 33.58, 2.69, 2.08, 5.23),
    "PC-DARTS": Attacked(94.02, 54.7, 45.3, 6.84, 6.23, 12.75),
}


DATASETS = {"CIFAR-10": CIFAR10, "CIFAR-100": CIFAR100, "ImageNet": IMAGENET, "Flowers-102": FLOWERS}

# Table 4.6: parameters against robustness, ImageNet, top-5. Members in order of size; the first is the baseline.
FAMILIES: dict[str, dict[str, Sized]] = {
    "EfficientNet": {
        "B0": Sized(5.29, 91.36, 8.11, 14.9),
        "B1": Sized(7.79, 88.89, 5.47, 7.0),
        "B2": Sized(9.11, 92.77, 11.4, 11.79),
        "B3": Sized(12.23, 93.04, 13.37, 10.11),
        "B4": Sized(19.34, 92.73, 16.99, 7.86),
        "B5": Sized(30.39, 90.95, 9.37, 2.96),
        "B6": Sized(43.04, 91.86, 11.71, 2.55),
        "B7": Sized(66.35, 91.57, 11.2, 1.59),
    },
    "DenseNAS (MBv2 space)": {
        "A": Sized(4.77, 90.94, 1.84, 3.61),
        "B": Sized(5.58, 91.89, 2.13, 3.56),
        "C": Sized(6.13, 92.31, 2.29, 3.48),
        "Large": Sized(6.48, 92.8, 2.97, 4.24),
    },
    "DenseNAS (ResNet space)": {
        "R1": Sized(11.09, 91.33, 2.01, 3.93),
        "R2": Sized(19.47, 92.47, 3.19, 3.51),
        "R3": Sized(24.66, 93.81, 4.32, 3.71),
    },
    "ResNet": {
        "18": Sized(11.69, 89.08, 2.41, 4.69),
        "50": Sized(25.56, 92.86, 4.68, 4.08),
    },
    "DenseNet": {
        "121": Sized(7.98, 91.97, 6.93, 12.89),
        "169": Sized(14.15, 92.81, 10.46, 10.6),
    },
}

# Table 4.7: CIFAR-10, DARTS search space, 20 cells.
DARTS_SPACE = {
    "DARTS": Repeated(3.35, 97.03, 7.09),
    "P-DARTS": Repeated(3.43, 97.12, 9.31),
    "PC-DARTS": Repeated(3.63, 97.05, 9.84),
    "RANDOM": Repeated(2.73, 95.57, 14.47, 0.49, 0.4, 4.7),
    "ENSEMBLE": Repeated(2.74, 93.77, 21.68, 0.41, 0.39, 0.35),
}
