"""The release itself."""

from evaluation.methods.groups import of_groups
from evaluation.registry import Candidate, method
from evaluation.releases import Release
from evaluation.study import Study


@method('k_salsa', 'k-SALSA', grouped=True, levers=True)
def k_salsa(study: Study, release: Release) -> Candidate:
    """One picture per group."""
    return of_groups(study.pictures(release.pictures()), release)
