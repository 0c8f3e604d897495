"""The list of systems: pure data, the only registry of the library.

A system is one published method under one name (its slug). Everything that walks the library - ``dynakern list``,
``create_model``, ``compare``, the README's table, the test suite - walks this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["SYSTEMS", "System", "find_system"]


@dataclass(frozen=True, kw_only=True)
class System:
    """One row of the catalogue.

    Attributes:
        slug: The system's name everywhere: file, claim, docs page, command line.
        title: What it is, in a few words.
        paper: Authors, year and identifier of the paper.
        wing: The package it lives in, e.g. ``"sequence"``; ``"ops"`` for an operator.
        kind: ``"operator"``, ``"network"``, ``"estimator"`` or ``"kernel"``.
        names: Import strings ``"module:object"`` of its public objects.
        variants: Names of the model functions in its module that ``create_model`` calls.
        tasks: Task name to the import string of a factory that builds a competitor for ``dynakern compare``.
        cli: Import string of ``main(argv)`` behind ``dynakern run SLUG``.
        lens: Import string of the function behind ``dynakern lens SLUG``.
        golden: Name of its folder of golden numbers, if it has one.
    """

    slug: str
    title: str
    paper: str
    wing: str
    kind: str
    names: tuple[str, ...]
    variants: tuple[str, ...] = ()
    tasks: Mapping[str, str] = field(default_factory=dict)
    cli: str | None = None
    lens: str | None = None
    golden: str | None = None

    @property
    def module(self) -> str:
        """Import path of the system's module."""
        return f"dynakern.{self.wing}.{self.slug}"


SYSTEMS: tuple[System, ...] = (
    System(
        slug="long_conv",
        title="learned kernels as long as the sequence, smoothed and squashed",
        paper="Fu et al., 2023, arXiv:2302.06646",
        wing="sequence",
        kind="network",
        names=(
            "dynakern.sequence:LongConv",
            "dynakern.sequence:LongConvModel",
            "dynakern.sequence:H3Conv",
            "dynakern.sequence.long_conv:LongConvKernel",
            "dynakern.sequence.long_conv:ButterflyFFT",
            "dynakern.sequence.long_conv:squash",
            "dynakern.sequence.long_conv:smooth_time",
            "dynakern.sequence.long_conv:smooth_frequency",
            "dynakern.ops:fft_conv",
            "dynakern.ops:block_fft",
            "dynakern.ops:three_pass_conv",
        ),
        variants=(
            "long_conv_classifier",
            "long_conv_lra_image",
            "long_conv_lra_listops",
            "long_conv_lra_pathfinder",
            "long_conv_lra_pathx",
            "long_conv_lra_text",
            "long_conv_scifar",
        ),
        tasks={
            "forecast": "dynakern.sequence.long_conv:forecast",
            "classify-series": "dynakern.sequence.long_conv:classify_series",
        },
        golden="longconv",
    ),
    System(
        slug="s4d",
        title="diagonal state-space layers",
        paper="Gu et al., 2022, arXiv:2206.11893",
        wing="sequence",
        kind="network",
        names=(
            "dynakern.sequence:S4D",
            "dynakern.sequence:S4DModel",
            "dynakern.sequence.s4d:S4DKernel",
            "dynakern.sequence.s4d:S4DRecurrence",
            "dynakern.sequence.s4d:vandermonde",
            "dynakern.sequence.s4d:ssm_init",
            "dynakern.sequence.s4d:hippo",
        ),
        variants=(
            "s4d_classifier",
            "s4d_scifar",
            "s4d_lra_listops",
            "s4d_lra_text",
            "s4d_lra_image",
            "s4d_lra_pathfinder",
            "s4d_lra_pathx",
            "s4d_sc35",
            "s4d_bidmc",
        ),
        tasks={
            "forecast": "dynakern.sequence.s4d:forecast",
            "classify-series": "dynakern.sequence.s4d:classify_series",
        },
        golden="s4d",
    ),
    System(
        slug="tempo",
        title="a prompted GPT-2 over trend, season and rest",
        paper="Cao et al., 2024, arXiv:2310.04948",
        wing="sequence",
        kind="network",
        names=(
            "dynakern.sequence:TEMPO",
            "dynakern.sequence.tempo:PromptPool",
            "dynakern.layers:GPT2",
            "dynakern.ops:stl",
        ),
        variants=("tempo", "tempo_small"),
        tasks={
            "forecast": "dynakern.sequence.tempo:forecaster",
            "classify-series": "dynakern.sequence.tempo:series_classifier",
        },
        golden="tempo",
    ),
    System(
        slug="selective_scan",
        title="state spaces that choose by the input: the scan, Mamba and its 2-D form",
        paper="Gu & Dao, 2023, arXiv:2312.00752; Liu et al., 2024, arXiv:2401.10166",
        wing="ops",
        kind="operator",
        names=("dynakern.ops:selective_scan", "dynakern.layers:Mamba", "dynakern.layers:SS2D"),
        tasks={
            "forecast": "dynakern.layers.mamba:forecast",
            "classify-series": "dynakern.layers.mamba:classify_series",
        },
        golden="selective-scan",
    ),
    System(
        slug="flash_rnn",
        title="recurrent networks with heads, and the solver that tiles their kernels",
        paper="Pöppel et al., 2024, arXiv:2412.07752",
        wing="sequence",
        kind="network",
        names=(
            "dynakern.sequence:FlashRNN",
            "dynakern.ops:flash_rnn",
        ),
        variants=("flash_elman", "flash_gru", "flash_lstm", "flash_slstm"),
        tasks={
            "forecast": "dynakern.sequence.flash_rnn:forecast",
            "classify-series": "dynakern.sequence.flash_rnn:classify_series",
        },
        golden="flashrnn",
    ),
    System(
        slug="chimera",
        title="state spaces over time and variates",
        paper="Behrouz et al., 2024, arXiv:2406.04320",
        wing="sequence",
        kind="network",
        names=(
            "dynakern.sequence:Chimera",
            "dynakern.sequence:SSM2D",
            "dynakern.sequence:ClosedLoop",
            "dynakern.sequence:ssm2d",
            "dynakern.ops:scan2d",
        ),
        variants=("chimera",),
        tasks={
            "forecast": "dynakern.sequence.chimera:forecaster",
            "detect": "dynakern.sequence.chimera:detector",
            "classify-series": "dynakern.sequence.chimera:series_classifier",
        },
        golden="chimera",
    ),
    System(
        slug="timesnet",
        title="2-D convolutions of series folded at their own periods",
        paper="Wu et al., 2023, arXiv:2210.02186",
        wing="sequence",
        kind="network",
        names=(
            "dynakern.sequence.timesnet:TimesNet",
            "dynakern.sequence.timesnet:TimesBlock",
            "dynakern.sequence.timesnet:InceptionConv2d",
            "dynakern.sequence.timesnet:dominant_periods",
        ),
        variants=(
            "timesnet",
            "timesnet_ecl",
            "timesnet_ett_imputation",
            "timesnet_etth1",
            "timesnet_etth2",
            "timesnet_ettm1",
            "timesnet_ettm2",
            "timesnet_exchange",
            "timesnet_ili",
            "timesnet_m4",
            "timesnet_msl",
            "timesnet_psm",
            "timesnet_smap",
            "timesnet_smd",
            "timesnet_swat",
            "timesnet_traffic",
            "timesnet_uea",
            "timesnet_weather",
        ),
        tasks={
            "forecast": "dynakern.sequence.timesnet:forecaster",
            "impute": "dynakern.sequence.timesnet:imputer",
            "detect": "dynakern.sequence.timesnet:detector",
            "classify-series": "dynakern.sequence.timesnet:series_classifier",
        },
        golden="timesnet",
    ),
    System(
        slug="fdconv",
        title="convolutions that weigh their own frequencies for each image",
        paper="Chen et al., 2025, arXiv:2503.18783",
        wing="vision",
        kind="network",
        names=(
            "dynakern.vision:FDConv",
            "dynakern.vision:FDConvResNet",
            "dynakern.vision:convert_to_fdconv",
            "dynakern.vision.fdconv:BandModulation",
            "dynakern.vision.fdconv:GlobalModulation",
            "dynakern.vision.fdconv:LocalModulation",
        ),
        variants=("fdconv_resnet18", "fdconv_resnet34", "fdconv_resnet50", "fdconv_resnet101"),
        tasks={"classify-images": "dynakern.vision.fdconv:classify_images"},
        golden="fdconv",
    ),
    System(
        slug="shiftaddvit",
        title="vision transformers that shift and add where others multiply",
        paper="You et al., 2023, arXiv:2306.06446",
        wing="vision",
        kind="network",
        names=(
            "dynakern.vision:PVTv2",
            "dynakern.vision:PVT",
            "dynakern.vision:ShiftLinear",
            "dynakern.vision:LinearAngularAttention",
            "dynakern.vision:convert_to_shiftadd",
            "dynakern.vision.shiftaddvit:PackedShiftLinear",
            "dynakern.vision.shiftaddvit:Experts",
            "dynakern.vision.shiftaddvit:KernelHash",
            "dynakern.vision.shiftaddvit:shift_add_experts",
            "dynakern.vision.shiftaddvit:energy_report",
        ),
        variants=(
            "pvt_large",
            "pvt_medium",
            "pvt_small",
            "pvt_tiny",
            "pvt_v2_b0",
            "pvt_v2_b1",
            "pvt_v2_b2",
            "pvt_v2_b3",
            "pvt_v2_b4",
            "pvt_v2_b5",
        ),
        tasks={"classify-images": "dynakern.vision.shiftaddvit:classify_images"},
        golden="shiftaddvit",
    ),
    System(
        slug="unireplknet",
        title="one large-kernel network for image, audio, video, points and series",
        paper="Ding et al., 2024, arXiv:2311.15599",
        wing="vision",
        kind="network",
        names=(
            "dynakern.vision:UniRepLKNet",
            "dynakern.vision.unireplknet:UniRepLKNetBlock",
            "dynakern.vision.unireplknet:DilatedReparamBlock",
            "dynakern.vision.unireplknet:PointProjection",
            "dynakern.vision.unireplknet:StationForecaster",
            "dynakern.vision.unireplknet:audio_to_map",
            "dynakern.vision.unireplknet:video_to_map",
            "dynakern.vision.unireplknet:log_mel",
            "dynakern.ops:depthwise_conv2d",
        ),
        variants=(
            "unireplknet_a",
            "unireplknet_b",
            "unireplknet_f",
            "unireplknet_l",
            "unireplknet_n",
            "unireplknet_p",
            "unireplknet_s",
            "unireplknet_t",
            "unireplknet_xl",
        ),
        tasks={"classify-images": "dynakern.vision.unireplknet:classify_images"},
        golden="unireplknet",
    ),
    System(
        slug="inception_next",
        title="a large depthwise convolution in cheap branches",
        paper="Yu et al., 2024, arXiv:2303.16900",
        wing="vision",
        kind="network",
        names=(
            "dynakern.vision:InceptionNeXt",
            "dynakern.vision:InceptionDWConv2d",
            "dynakern.ops:inception_conv",
        ),
        variants=(
            "inception_next_atto",
            "inception_next_base",
            "inception_next_base_384",
            "inception_next_small",
            "inception_next_tiny",
        ),
        tasks={"classify-images": "dynakern.vision.inception_next:classify_images"},
        golden="inceptionnext",
    ),
    System(
        slug="lsnet",
        title="small kernels that a wide view chooses for every pixel",
        paper="Wang et al., 2025, arXiv:2503.23135",
        wing="vision",
        kind="network",
        names=(
            "dynakern.vision:LSNet",
            "dynakern.vision:LSConv",
            "dynakern.vision:LKP",
            "dynakern.ops:ska",
        ),
        variants=("lsnet_b", "lsnet_s", "lsnet_t"),
        tasks={"classify-images": "dynakern.vision.lsnet:classify_images"},
        golden="lsnet",
    ),
    System(
        slug="replknet",
        title="convolutions of 31 x 31 pixels, and how far networks see",
        paper="Ding et al., 2022, arXiv:2203.06717; Zhang et al., 2025, arXiv:2410.08049",
        wing="vision",
        kind="network",
        names=(
            "dynakern.vision:RepLKNet",
            "dynakern.vision:sweep_kernels",
            "dynakern.vision:shape_bias",
        ),
        variants=("replknet_31b", "replknet_31l", "replknet_xl"),
        tasks={"classify-images": "dynakern.vision.replknet:classify_images"},
        golden="universal-kernels",
    ),
    System(
        slug="dynamic_pruning",
        title="filters that each image switches on and off",
        paper="Elkerdawy et al., 2022, arXiv:2110.08232",
        wing="adaptive",
        kind="network",
        names=(
            "dynakern.adaptive:DynamicPruner",
            "dynakern.adaptive.dynamic_pruning:MaskedConv",
            "dynakern.adaptive.dynamic_pruning:MaskPredictor",
            "dynakern.adaptive.dynamic_pruning:VGG",
            "dynakern.adaptive.dynamic_pruning:CifarResNet",
            "dynakern.adaptive.dynamic_pruning:MobileNetV1",
            "dynakern.adaptive.dynamic_pruning:MobileNetV2",
            "dynakern.adaptive.dynamic_pruning:SkippingNetwork",
            "dynakern.adaptive.dynamic_pruning:filter_response",
            "dynakern.adaptive.dynamic_pruning:mass_mask",
            "dynakern.adaptive.dynamic_pruning:uniform_mask",
        ),
        variants=(
            "ftwt_mobilenetv1",
            "ftwt_mobilenetv1_50",
            "ftwt_mobilenetv1_75",
            "ftwt_mobilenetv2",
            "ftwt_resnet20",
            "ftwt_resnet56",
            "ftwt_resnet110",
            "ftwt_vgg11_bn",
            "ftwt_vgg13_bn",
            "ftwt_vgg16_bn",
            "ftwt_vgg19_bn",
        ),
        tasks={"classify-images": "dynakern.adaptive.dynamic_pruning:classify_images"},
        golden="ftwt",
    ),
    System(
        slug="terminator",
        title="image-sized kernels that meet the activations, without residuals or attention",
        paper="Zhang, 2024, arXiv:2401.17948",
        wing="vision",
        kind="network",
        names=(
            "dynakern.vision:Terminator",
            "dynakern.vision.terminator:SFNEBlock",
            "dynakern.vision.terminator:MAGNet",
            "dynakern.vision.terminator:MAGNetLocal",
            "dynakern.vision.terminator:RecursiveGate",
            "dynakern.vision.terminator:HyperChannel",
            "dynakern.vision.terminator:HyperInteraction",
            "dynakern.vision.terminator:GroupStandardize",
            "dynakern.vision.terminator:slow_neural_loss",
        ),
        variants=("terminator_cifar10", "terminator_cifar100"),
        tasks={"classify-images": "dynakern.vision.terminator:classify_images"},
        golden="hyperzzw",
    ),
    System(
        slug="density",
        title="kernel densities in many dimensions, and which of their regimes one is in",
        paper="Biroli & Mezard, 2024, arXiv:2408.05807",
        wing="similarity",
        kind="estimator",
        names=(
            "dynakern.similarity:HighDimKDE",
            "dynakern.similarity:kde_phases",
            "dynakern.similarity:KDEPhases",
            "dynakern.similarity.density:Diagnosis",
            "dynakern.similarity.density:expected_log_partition",
            "dynakern.similarity.density:expected_participation",
            "dynakern.ops:kernel_sums",
        ),
        tasks={"density": "dynakern.similarity.density:density"},
        cli="dynakern.similarity.density.command:main",
        golden="kde",
    ),
    System(
        slug="private",
        title="similarities to a private data set, released once",
        paper="Backurs et al., 2024, arXiv:2403.08917",
        wing="similarity",
        kind="estimator",
        names=(
            "dynakern.similarity:PrivateDistanceSum",
            "dynakern.similarity:PrivateKDE",
            "dynakern.similarity:PrivateSimilarityClassifier",
            "dynakern.similarity:PrivacyAccountant",
            "dynakern.similarity.private:audit_epsilon",
            "dynakern.similarity.private:draw_frequencies",
            "dynakern.similarity.private:inverse_mixture",
            "dynakern.similarity.private:release_tree",
            "dynakern.similarity.private:release_count_sums",
            "dynakern.similarity.private:release_moments",
            "dynakern.similarity.private:release_rff",
            "dynakern.similarity.private:release_fgt",
            "dynakern.similarity.private:release_centroids",
        ),
        tasks={
            "classify": "dynakern.similarity.private:classify",
            "density": "dynakern.similarity.private:density_estimator",
        },
        golden="private-similarity",
    ),
    System(
        slug="deep_kernel_machine",
        title="kernel methods with layers, whose Gram matrices follow the labels",
        paper="Yang et al., 2023, arXiv:2108.13097",
        wing="similarity",
        kind="estimator",
        names=(
            "dynakern.similarity:DKMClassifier",
            "dynakern.similarity:DKMRegressor",
            "dynakern.similarity:SparseDKM",
            "dynakern.similarity:FullDKM",
            "dynakern.similarity.deep_kernel_machine:GramKernel",
            "dynakern.similarity.deep_kernel_machine:GramLayer",
            "dynakern.similarity.deep_kernel_machine:GramNorm",
            "dynakern.similarity.deep_kernel_machine:GramState",
        ),
        tasks={
            "classify": "dynakern.similarity.deep_kernel_machine:classify",
            "regress": "dynakern.similarity.deep_kernel_machine:regress",
        },
        golden="dkm",
    ),
    System(
        slug="quantum",
        title="quantum feature maps, their kernels and variational classifiers, simulated",
        paper="Havlíček et al., 2019, arXiv:1804.11326",
        wing="similarity",
        kind="kernel",
        names=(
            "dynakern.similarity:QuantumKernel",
            "dynakern.similarity:QuantumKernelClassifier",
            "dynakern.similarity:VariationalQuantumClassifier",
            "dynakern.similarity:ZZFeatureMap",
            "dynakern.similarity:ZFeatureMap",
            "dynakern.similarity:PauliFeatureMap",
            "dynakern.similarity:ad_hoc_data",
            "dynakern.similarity:psd_repair",
            "dynakern.similarity.quantum:KernelDiagnosis",
            "dynakern.similarity.quantum:align_scale",
            "dynakern.similarity.quantum:apply_ansatz",
            "dynakern.similarity.quantum:diagnose",
            "dynakern.similarity.quantum:entangling_sets",
            "dynakern.similarity.quantum:kernel_alignment",
            "dynakern.similarity.quantum:parity",
            "dynakern.ops:pauli_states",
        ),
        tasks={"classify": "dynakern.similarity.quantum:classify"},
        golden="quantum",
    ),
)


def find_system(slug: str) -> System:
    """Return the row of ``slug``.

    Raises:
        ValueError: No system has this name; the message suggests the nearest.
    """
    for system in SYSTEMS:
        if system.slug == slug:
            return system
    from dynakern.checks import unknown_name

    raise ValueError(unknown_name("system", slug, [system.slug for system in SYSTEMS]))
