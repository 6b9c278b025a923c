"""Predicting 20 Hippocampus cases with mirroring: seconds and peak memory, ours and nnU-Net's, with one network.

The network is that of nnU-Net's 3d_fullres plan for this dataset. The same weights (random ones of a fixed seed, or
those of `--model`, a fold trained with this architecture) are written as our checkpoint and as nnU-Net's results
folder; both commands then predict the same files, on the CPU, from start to end of the process.

    python benchmarks/predict.py --dataset ../shared/data/Dataset004_Hippocampus --nnunet-python /path/to/bin/python
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measure import bytes_text, machine, markdown_table, measure, peer_line, seconds_text  # noqa: E402
from torch import Tensor  # noqa: E402

from autoseg.checkpoint import Checkpoint  # noqa: E402
from autoseg.image import read_image  # noqa: E402
from autoseg.labels import Labels  # noqa: E402
from autoseg.networks import build_network  # noqa: E402
from autoseg.plan import (  # noqa: E402
    Architecture,
    Budget,
    Configuration,
    Normalization,
    Plan,
    PreprocessingSettings,
    TrainingSettings,
)
from autoseg.workspace import CHECKPOINT  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_DATASET = ROOT.parent / "shared" / "data" / "Dataset004_Hippocampus"
PATCH = (40, 56, 40)
FEATURES = (32, 64, 128, 256)


def main() -> None:
    """Write both models, predict with both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=DEFAULT_DATASET)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--model", type=Path, help="a trained fold of this architecture; default: random weights")
    parser.add_argument(
        "--nnunet-python", type=Path, help="python of an environment with nnunetv2; without it ours only"
    )
    arguments = parser.parse_args()
    print(machine())
    if arguments.nnunet_python:
        print(f"peer: {peer_line(arguments.nnunet_python)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = sorted((arguments.dataset / "imagesTr").glob("*_0000.nii.gz"))[: arguments.cases]
        (folder / "images").mkdir()
        for image in images:
            shutil.copy(image, folder / "images")
        checkpoint = mirrored(Checkpoint.load(arguments.model / CHECKPOINT)) if arguments.model else random_checkpoint()
        rows = [measure_ours(folder, checkpoint)]
        if arguments.nnunet_python:
            rows.append(measure_peer(folder, checkpoint, arguments.nnunet_python))
    print(f"\n{len(images)} cases, mirroring along three axes, weights: {arguments.model or 'random'}\n")
    print(markdown_table(("", "time", "peak memory", "labels that agree"), rows))


def random_checkpoint() -> Checkpoint:
    """nnU-Net's network for this dataset with random weights of a fixed seed."""
    labels = Labels(("Anterior", "Posterior"), ((1,), (2,)))
    architecture = Architecture(
        input_channels=1,
        output_channels=3,
        features=FEATURES,
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        kernels=((3, 3, 3),) * 4,
        encoder_convs=(2,) * 4,
        decoder_convs=(2,) * 3,
    )
    preprocessing = PreprocessingSettings((1.0, 1.0, 1.0), (0, 1, 2), (Normalization("zscore"),))
    configuration = Configuration(
        "3d_fullres", "3d", preprocessing, (36, 50, 35), PATCH, 9, architecture, TrainingSettings()
    )
    plan = Plan("Hippocampus", ("MRI",), labels, ".nii.gz", Budget(2**33, 0.0), (configuration,), {}, (), "none")
    torch.manual_seed(0)
    return Checkpoint(plan, "3d_fullres", "0", build_network(architecture).state_dict())


def mirrored(checkpoint: Checkpoint) -> Checkpoint:
    """The same model, mirrored along all three axes whatever its plan says; the plan holds nothing else."""
    settings = checkpoint.settings
    settings = replace(settings, training=replace(settings.training, mirror_axes=(0, 1, 2)))
    return replace(checkpoint, plan=replace(checkpoint.plan, configurations=(settings,)))


def measure_ours(folder: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Predict with `autoseg predict`."""
    checkpoint.save(folder / "ours" / "fold_0" / CHECKPOINT)
    command = [sys.executable, "-m", "autoseg", "predict", folder / "images", folder / "ours_labels"]
    options = ["--model", folder / "ours" / "fold_0", "--device", "cpu", "--quiet"]
    ours = measure([*command, *options], environment={"PYTHONPATH": str(ROOT)})
    return "autoseg", seconds_text(ours.seconds), bytes_text(ours.peak_bytes), ""


def measure_peer(folder: Path, checkpoint: Checkpoint, python: Path) -> tuple[str, ...]:
    """Predict with `nnUNetv2_predict_from_modelfolder` and compare the labels."""
    model = folder / "peer"
    (model / "fold_0").mkdir(parents=True)
    (model / "dataset.json").write_text(json.dumps(peer_dataset(checkpoint.plan)))
    (model / "plans.json").write_text(json.dumps(peer_plans(checkpoint)))
    state = {
        "network_weights": peer_weights(checkpoint),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(state, model / "fold_0" / "checkpoint_final.pth")  # the peer reads nothing but pickles
    tool = python.parent / "nnUNetv2_predict_from_modelfolder"
    command = [tool, "-i", folder / "images", "-o", folder / "peer_labels"]
    variables = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), str(folder))
    peer = measure([*command, "-m", model, "-f", "0", "-device", "cpu"], environment=variables)
    agree = [
        np.mean(read_image(path).array == read_image(folder / "ours_labels" / path.name).array)
        for path in sorted((folder / "peer_labels").glob("*.nii.gz"))
    ]
    return "nnU-Net", seconds_text(peer.seconds), bytes_text(peer.peak_bytes), f"{np.mean(agree):.3%}"


def peer_dataset(plan: Plan) -> dict[str, object]:
    """dataset.json of the results folder."""
    channels = {str(number): name for number, name in enumerate(plan.channels)}
    return {"channel_names": channels, "file_ending": plan.file_ending, "numTraining": 1, **plan.labels.to_json()}


def peer_plans(checkpoint: Checkpoint) -> dict[str, object]:
    """plans.json as nnU-Net's planner writes it, for our architecture."""
    settings = checkpoint.settings
    a = settings.architecture
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    network = {
        "n_stages": len(a.features),
        "features_per_stage": a.features,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": a.kernels,
        "strides": a.strides,
        "n_conv_per_stage": a.encoder_convs,
        "n_conv_per_stage_decoder": a.decoder_convs,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": settings.batch_size,
        "patch_size": settings.patch_size,
        "median_image_size_in_voxels": settings.median_shape,
        "spacing": settings.preprocessing.spacing,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": function,
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": function,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": function,
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": network,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    return {
        "dataset_name": "Dataset004_Hippocampus",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": list(settings.median_shape),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }


def peer_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Our weights under the names of nnU-Net's PlainConvUNet, with its aliases."""
    parts = {"0": "conv", "1": "norm"}
    features = checkpoint.settings.architecture.features
    unscored = len(features) - 1 - len({name.split(".")[1] for name in checkpoint.weights if name.startswith("heads")})
    weights: dict[str, Tensor] = {}
    for stage in range(unscored):  # nnU-Net has heads there too, and weights them with zero
        weights[f"decoder.seg_layers.{stage}.weight"] = torch.zeros(
            checkpoint.settings.architecture.output_channels, features[-2 - stage], 1, 1, 1
        )
        weights[f"decoder.seg_layers.{stage}.bias"] = torch.zeros(checkpoint.settings.architecture.output_channels)
    for name, tensor in checkpoint.weights.items():
        room, stage, *rest = name.split(".")
        if room == "up":
            weights[f"decoder.transpconvs.{stage}.{rest[0]}"] = tensor
        elif room == "heads":
            weights[f"decoder.seg_layers.{int(stage) + unscored}.{rest[0]}"] = tensor
        else:
            block, part, kind = rest
            inside = "0.convs" if room == "encoder" else "convs"  # its encoder wraps each stage once more
            for alias in (parts[part], f"all_modules.{part}"):
                path = f"{room}.stages.{stage}.{inside}.{block}.{alias}.{kind}"
                weights[path] = tensor
                if room == "encoder":  # its decoder lists the encoder as its own
                    weights[f"decoder.{path}"] = tensor
    return {name: tensor.clone() for name, tensor in weights.items()}


if __name__ == "__main__":
    main()
