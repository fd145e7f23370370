"""Fundus phantoms: procedural colour fundus photographs whose vessels and lesions are known.

A phantom is a function of (seed, patient, eye, visit, grade, size). The patient gives traits that
both eyes share (pigment, vessel calibre, tortuosity, disc, camera), the eye gives its own vessel
tree, disc, texture and lesions, and the visit gives gaze, illumination, focus and noise.

Geometry is in degrees of visual angle on the retina, the fovea at the origin, x towards the nose
and y up; a left eye is mirrored when it is drawn. One degree is about 0.29 mm. Pictures show a
field of about 45 degrees. Optical densities are integrated over each pixel's area, so
every size is rendered directly, without supersampling.

Sources of the measures: disc 1.8 mm wide, 15.5 degrees nasal of the fovea; large veins
0.12-0.18 mm, arteries 2/3 to 3/4 of the veins' calibre; Murray's law (1926) for branching;
the international clinical diabetic retinopathy scale (Wilkinson et al. 2003) for the lesions.
"""

from datasets.phantoms.dataset import GRADE_SHARES, MAX_SIZE, MIN_SIZE, draw_grades, make_dataset
from datasets.phantoms.render import EYES, GRADES, Lesion, Phantom, render_phantom

__all__ = [
    'EYES',
    'GRADES',
    'GRADE_SHARES',
    'MAX_SIZE',
    'MIN_SIZE',
    'Lesion',
    'Phantom',
    'draw_grades',
    'make_dataset',
    'render_phantom',
]
