"""The smallest plan that keeps the floor, and the certificate that it does."""

from resect.searching.certificate import Certificate, certify, certify_artefact, walk
from resect.searching.fitting import fit
from resect.searching.floor import Budget, Floor
from resect.searching.found import Found, Trial
from resect.searching.search import search

__all__ = ["Budget", "Certificate", "Floor", "Found", "Trial", "certify", "certify_artefact", "fit", "search", "walk"]
