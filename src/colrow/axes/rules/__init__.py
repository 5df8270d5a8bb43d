"""One rule per operator, in files by family; :mod:`colrow.axes.rules.default` puts them together."""
