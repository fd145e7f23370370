"""Where data sets and weight files are. Edit here, or override.

Order of precedence: a script's flag, then the environment variable KSALSA_<NAME IN CAPITALS>
(e.g. KSALSA_APTOS_TRAIN, KSALSA_MOCO), then the entry below. None means: not set. Relative paths
start at the project folder, so scripts work from anywhere.
"""

import os
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]


def _set(name: str, default: str | None = None) -> str | None:
    value = os.environ.get(f'KSALSA_{name.upper()}') or default
    return None if value is None else str(PROJECT_ROOT / Path(value).expanduser())


# Folders of photographs (searched recursively) or archives made by scripts/dataset_tool.py
dataset_paths = {
    name: _set(name)
    for name in (
        'aptos_train',
        'aptos_test',
        'eyepacs_train',
        'eyepacs_test',
        'phantoms_train',
        'phantoms_test',  # made by scripts/make_phantoms.py
        'my_train_data',
        'my_test_data',
    )
}

# Weight files of other projects; which script needs which is in pretrained_models/README.md
model_paths = {
    'moco': _set('moco', 'pretrained_models/moco_v2_800ep_pretrain.pt'),
    'alexnet': _set('alexnet', 'pretrained_models/alexnet-owt-7be5be79.pth'),
    'vgg19': _set('vgg19', 'pretrained_models/vgg19-dcbb9e9d.pth'),
    'resnet34': _set('resnet34', 'pretrained_models/resnet34-333f7ec4.pth'),
}
