"""How real a release looks beside photographs of other people: distances and sharpness."""
from evaluation.fidelity import fidelity
from evaluation.population import people_of
from evaluation.registry import interval, measure
from evaluation.spectra import sharpness
from evaluation.study import Study


@measure('fidelity', 'Fréchet and kernel distance on the content encoder',
         lambda r: {'FD-fundus': interval(r['fd'], '.3f'), 'KID-fundus': interval(r['kid'], '.1e')},
         depends=lambda study: {'content encoder': study.content_digest})
def fundus_distances(study: Study):
    """Features of the photographs are computed once."""
    real, people = study.content(study.others), people_of(study.population.others)
    return lambda candidate, folder: fidelity(real, study.content(candidate.pictures),
                                              real_people=people, seed=study.seed)


@measure('sharpness', 'radial power spectra', lambda r: {})
def spectra(study: Study):
    """Not in the table; in results.json."""
    return lambda candidate, folder: sharpness(study.others, candidate.pictures)
