"""Work done with embax: data, models, training loops. Needs the ``train`` extra, ``pip install 'embax[train]'``."""
