"""The namespace of this package's operators in `torch.ops`."""

# the name the package was imported under, since several versions of it may be loaded, each under a name of its own
NAMESPACE = __package__
