"""The networks behind a release, as files: what is loaded, recorded and named in the manifest."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anonymization.optimize import OptimizeConfig, style_term
from models.features import FeatureNet
from models.features.content import ContentNetwork, load_content_network
from models.features.guide import FORMAT, Guide, load_guide
from models.features.pretrained import FeatureNetwork, weight_file
from models.features.style import FILTERS, load_style_network
from models.psp import PSP, load_psp
from utils.errors import UserError
from utils.io import sha256_file


class Loaded(NamedTuple):
    """The networks on the CPU; content and style are one object where they are the same file."""

    psp: PSP
    content: ContentNetwork | FeatureNetwork
    style: FeatureNet | None
    guide: Guide | None


@dataclasses.dataclass(frozen=True)
class Networks:
    """Where the networks are.

    checkpoint: ReStyle-pSp file, encoder and generator. content: file of a content network, or an
    installed one ('lite0', 'lite1', 'lite2'). style: VGG19 file, an installed network, 'filters'
    for the built-in filter bank, or None for no style loss. content_arch, style_arch: timm
    architectures of files of other networks. guide: file of models.features.guide, for the
    features of a pretrained content network.
    """

    checkpoint: str | Path
    content: str | Path
    style: str | Path | None = FILTERS
    content_arch: str | None = None
    style_arch: str | None = None
    guide: str | Path | None = None

    def files(self) -> dict[str, Path]:
        """Weight files by role; UserError for an installed network that is not there."""
        found = {'checkpoint': Path(self.checkpoint), 'content network': weight_file(self.content)}
        if self.style is not None and str(self.style) != FILTERS:
            found['style network'] = weight_file(self.style)
        if self.guide is not None:
            found['guide'] = Path(self.guide)
        return found

    def options(self) -> dict[str, str | None]:
        """What was asked for, by flag of scripts/k-SALSA.py."""
        return {
            'checkpoint_path': str(self.checkpoint),
            'content_weights': str(self.content),
            'content_arch': self.content_arch,
            'style_weights': None if self.style is None else str(self.style),
            'style_arch': self.style_arch,
            'guide': None if self.guide is None else str(self.guide),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> 'Networks':
        """The networks of a run, from `options` as it recorded them."""
        return cls(
            options['checkpoint_path'],
            options['content_weights'],
            options['style_weights'],
            options['content_arch'],
            options['style_arch'],
            options['guide'],
        )

    def load(self, config: OptimizeConfig) -> Loaded:
        """Reads them; UserError for a file that is none, or a network that needs larger pictures.

        config: the settings under which the style network will work.
        """
        psp = load_psp(self.checkpoint)
        content = load_content_network(self.content, arch=self.content_arch)
        if isinstance(content, FeatureNetwork):
            content.check_side(psp.input_size)
        if self.style is None:
            return Loaded(psp, content, None, self._guide(content))
        same = (self.content, self.content_arch) == (self.style, self.style_arch)
        style = (
            content
            if same and isinstance(content, FeatureNetwork)
            else load_style_network(self.style, arch=self.style_arch)
        )
        style_term(style, config).check_side(psp.input_size)
        return Loaded(psp, content, style, self._guide(content))

    def _guide(self, content: ContentNetwork | FeatureNetwork) -> Guide | None:
        if self.guide is None:
            return None
        if not isinstance(content, FeatureNetwork):
            raise UserError(
                f'`guide` {self.guide} goes with a pretrained content network, such as '
                '`content_weights`=lite0'
            )
        return load_guide(self.guide, n_features=content.n_features, digest=content.digest)

    def facts(self, loaded: Loaded) -> dict[str, str]:
        """Name and SHA-256 of each network, for the manifest."""
        files = self.files()
        return {
            'generator and encoder': sha256_file(self.checkpoint),
            'content': _fact(loaded.content, files['content network']),
            'style': _fact(loaded.style, files.get('style network')),
            'guide': 'none' if loaded.guide is None else f'{FORMAT} {loaded.guide.digest}',
        }


def _fact(net: FeatureNet | None, file: Path | None) -> str:
    if net is None:
        return 'none'
    return f'{net.name} {sha256_file(file)}' if file else str(net.name)
