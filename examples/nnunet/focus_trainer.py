"""An nnU-Net v2 trainer with our norm and activation in its network and our fused dice and cross-entropy as its loss.

Plans, network, deep supervision, schedule and the loss's numbers stay nnU-Net's, and so do the names of the weights:
checkpoints may be exchanged with `nnUNetTrainer`. For 3D configurations. nnU-Net 2.8.1 finds the class through the
folder that holds this file and nothing else:

    nnUNet_extTrainer=examples/nnunet nnUNetv2_train DATASET 3d_fullres 0 -tr FocusTrainer
    nnUNet_extTrainer=examples/nnunet nnUNetv2_predict -i CTS -o OUT -d DATASET -c 3d_fullres -tr FocusTrainer
"""

from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from focuskernels.integrations import fuse_norm_act
from focuskernels.integrations.nnunet import DC_and_CE_loss


class FocusTrainer(nnUNetTrainer):
    """nnU-Net's default trainer, with fused norm, activation and loss."""

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net's network, each InstanceNorm3d and LeakyReLU in one module; for training and for prediction."""
        return fuse_norm_act(
            nnUNetTrainer.build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            )
        )

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.label_manager.has_regions:  # overlapping regions have a sigmoid loss, which stays nnU-Net's
            return loss
        fused = DC_and_CE_loss(
            {"batch_dice": self.configuration_manager.batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": self.is_ddp},
            {},
            ignore_label=self.label_manager.ignore_label,
        )
        if not isinstance(loss, DeepSupervisionWrapper):
            return fused
        loss.loss = fused
        return loss
