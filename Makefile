# make quickstart   environment, real images, both training stages, samples, metrics, a picture: minutes on 2 cores
# make ablation     the paper's ablations on the same digits, three seeds: hours; SUITE=tokens64 or cifar for the longer ones
# make test         environment, lint, all CPU tests
# make test-faults  the long fault-injection tests
# make clean        remove what quickstart made (not the environment)

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

Q := quickstart
DATA := $(Q)/data/mnist.tar
NUM_SAMPLES := 500
SUITE := digits

.PHONY: quickstart ablation test test-faults clean

$(READY): requirements.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else \
		'Python 3.11 or 3.12 is needed, and $(PYTHON) is %d.%d: make PYTHON=python3.11 ...' % v)"
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --upgrade pip
	@echo "installing requirements.txt into .venv (about two minutes)"
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

# spinning threads are several times slower when other programs run too
quickstart: export OMP_WAIT_POLICY = PASSIVE
quickstart: $(READY)
	@echo "== 1/5 real images: 5,000 handwritten digits as an ImageNet-shaped tar"
	$(PY) -m dataset.toy --out $(Q)/data
	@echo "== 2/5 S-VAE"
	$(PY) train.py @recipes/nano-svae.txt --data-path $(DATA) --results-dir $(Q)/svae
	@echo "== 3/5 SphereAR-Nano"
	$(PY) train.py @recipes/nano.txt --data-path $(DATA) --results-dir $(Q)/ar --trained-vae $(Q)/svae/checkpoints/last.pt
	@echo "== 4/5 $(NUM_SAMPLES) samples"
	$(PY) sample_ddp.py --model SphereAR-Nano --ckpt $(Q)/ar/checkpoints/last.pt --sample-dir $(Q)/samples \
		--num-fid-samples $(NUM_SAMPLES) --labels balanced --num-sampling-steps 25 --cfg-scale 3 \
		--per-proc-batch-size 250 --to-npz
	@echo "== 5/5 metrics"
	$(PY) evaluator.py $(Q)/data/reference.npz $(Q)/samples/samples.npz
	$(PY) -m dataset.toy --judge $(DATA) $(Q)/samples/samples.npz
	@echo "picture: $(Q)/samples/contact_sheet.png"

ablation: $(READY)
	$(PY) -m benchmarks.ablation --suite $(SUITE)

test: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest

test-faults: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m faults

clean:
	rm -rf $(Q)
