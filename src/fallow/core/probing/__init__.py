"""The parts of `fallow.probe` (`fallow.core.probe`): what runs the batches, and what is gathered from them.

options                  what can be asked for, and how
batches                  what a batch is: its loss, its samples, its label tokens, its mask
source                   many of them, and by which values they are known
borrowing                a model that is as it was afterwards, whatever happens
layers                   the layers that are meant, and their inputs as rows
inputs                   hooks on inputs: each input that layers share is taken once
covariance, components   what is gathered there
gradients                dense gradients layer by layer: their mean, a sketch, the Fisher diagonal
contribution             integrated gradients between two states of a model
spectra                  singular values of the weights
ranks                    several processes
files                    the cache, and the state that an interrupted run goes on from
of_targets               gradients for a choice of entries (`fallow.selection`)
memory, watching         how many bytes a run keeps; a bar for it
run, results             the passes, and Statistics from their sums
"""
