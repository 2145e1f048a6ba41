"""The machinery below the loss. A new loss, dataset or model needs no change here.

trainer.py          the loop: train, evaluate, update, log
updates.py          an update of the weights: clipping, the optimizer, its schedule
saving.py           what a trainer writes for later: LATEST, step-N/, states, not_finite/
train_state.py      everything that changes during training, except for the weights
engine.py           Batch, Outcome, Forward: one global batch through a model and its gradient back
prefetch.py         batches prepared one ahead, in a thread
scalars.py          metrics and times of a step, read from the device in one transfer
loader.py           batches of tokenized examples as a function of (seed, epoch)
epoch.py            rows of an epoch as arrays; rows of one prompt in one batch
examples.py         Example, Dataset: what is known of a prompt and its responses
example_table.py    examples without their texts, as arrays
thinning.py         weights of datasets: which rows an epoch has
sources.py          rows of a known form, from files and hub datasets, as a Dataset
forms.py            the forms of rows: pairs, feedback, conversations, rankings
rows.py             one row: its columns, and their values checked
turns.py            Human / Assistant texts as chat messages
datafiles.py        rows of files: json, jsonl, csv, parquet, also compressed
hub.py              datasets of the hub and local copies of them
dataset_specs.py    the files of config/dataset: composed with Hydra, and checked
chat.py             chat messages as text
tokens.py           texts as token ids; truncation
token_store.py      token ids on disk, memory-mapped
demo.py             the embedded dataset
positions.py        how many tokens a model can read; rotary frequencies fixed for a run
adapters.py         LoRA: trained matrices beside frozen weights, off for the reference, merged when saved
models.py           the network: policy, value head, one forward pass
base.py             the base model: its files, tokenizer and config
loading.py          policy and reference from the hub, directories and checkpoints
weight_files.py     safetensors of a base model, checked by their headers
weights.py          streams of weights into sharded models
packing.py          examples as one packed sequence with shared prompts; its attention
packing_check.py    the check at the start of a run that packed equals padded
reference_cache.py  reference log-probs, computed once for all runs
reference_key.py    what determines a reference log-prob besides its tokens
logps_store.py      log-probs of responses on disk, under addresses of their content
logps.py            log-probs of tokens from hidden states, in chunks
reference_kl.py     KL divergence from the reference model at each token, in chunks
optimizers.py       the optimizer: of torch.optim, Muon, or of torchao; which parameters it treats how
muon.py             Muon for hidden matrices, on any number of ranks, and AdamW for the rest
sharding.py         activation checkpointing, compilation and FSDP
distributed.py      ranks, devices and collectives
openmp.py           how OpenMP's threads wait: set before torch is imported
launch.py           starting the processes of a run and reporting the first failure
watching.py         the launcher's watch over its processes, and signals to them
scratch.py          the launcher's temporary folder and semaphores
checkpoint.py       policy.pt and the Hugging Face export: save and load
states.py           the states that a run resumes from: written in the background, read back
resume.py           going on with a run: is it the same, and from which state
stopping.py         signals that ask a run to stop
mishaps.py          a value that is not finite, too little memory: what is said and kept of it
run_dir.py          the run directory: its path, its lock, its config.yaml, its model card
records.py          what an evaluation says of each test response: evaluations/step-N.parquet
displacement.py     likelihood displacement: chosen responses become less likely while margins rise
ches.py             CHES scores: pairs that are too alike to the model
best.py             the best evaluation of a run: when BEST/ is written, and when the patience is over
metrics.py          metrics.jsonl and the progress bar
loggers.py          other places for metrics: wandb, trackio, tensorboard
pictures.py         how pictures look: colours and style
curves.py           curves.png
reward_model.py     a reward model: its head, its forward pass, and the form in which transformers opens it
scoring.py          scores of a trained reward model; the best of several responses
sampling.py         responses from a model
samplers.py         the models that eval.py samples from, and where they run
serving.py          responses from an OpenAI-compatible server, or from vLLM
sample_files.py     samples as they come, and the rows of the finished file
advice.py           what is worth knowing before the first update
config.py           validation of the configuration: values
config_keys.py      validation of the configuration: which keys there are
saved_config.py     the config.yaml of a run: read, completed and changed
components.py       the classes that a configuration names
rules.py            what values of the configuration can be
commands.py         errors and flags of the commands
console.py          halos-train, halos-eval, halos-compare
project_dir.py      where config/ and assets/ are
errors.py           UserError
files.py            writing files whole
locks.py            one writer at a time
manifest.py         sizes and checksums of a directory's files
secrets.py          keys and passwords: learned when they come in, replaced in what goes out
judge/              everything of compare.py
plan/               everything of scripts/plan.py
inspection/         everything of scripts/inspect_data.py
suite/              everything of scripts/suite.py
loss_card/          everything of scripts/loss_card.py
"""

from halos import openmp

openmp.spin_briefly()
