"""Data sets for encoder training, by the name given to --dataset_type.

To train on your own photographs, set `my_train_data` and `my_test_data` in paths_config.py (or
give --train_path and --test_path), or add an entry. Source and target are the same pictures: the
encoder learns to draw what it sees.
"""

from typing import Any

from configs.paths_config import dataset_paths
from configs.transforms_config import EncodeTransforms


def _entry(train: str, test: str) -> dict[str, Any]:
    return {
        'transforms': EncodeTransforms(),
        'train_source_root': dataset_paths[train],
        'train_target_root': dataset_paths[train],
        'test_source_root': dataset_paths[test],
        'test_target_root': dataset_paths[test],
    }


DATASETS = {
    'aptos_encode': _entry('aptos_train', 'aptos_test'),
    'eyepacs_encode': _entry('eyepacs_train', 'eyepacs_test'),
    'phantoms_encode': _entry('phantoms_train', 'phantoms_test'),
    'my_data_encode': _entry('my_train_data', 'my_test_data'),
}
