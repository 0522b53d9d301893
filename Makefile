# make run    set up .venv, then the main job: every baseline on one model and target, table and figures
# make digits the same for both models on both targets, three seeds
# make test   lint, types, tests
PYTHON ?= python3
PY := .venv/bin/python
BASELINES := zero_shot,finetune,wise_ft,dare,magnitude,grafting,tailor,tailor_exact,tailor_two_sided
ONE := experiment=digits_llava_flickr
ALL := seed=0,1,2 experiment=digits_llava_flickr,digits_llava_okvqa,digits_instructblip_flickr,digits_instructblip_gqa

.PHONY: run digits test lint types clean
.DELETE_ON_ERROR:

# A sweep's failed jobs don't stop the others: the table shows what finished and names what failed.
define sweep
	@sweep=$${TAILOR_HOME:-outputs}/sweeps/$$(date +%Y-%m-%d_%H-%M-%S)_$@; status=0; \
	$(PY) -m experiments.run -m hydra.sweep.dir=$$sweep baseline=$(BASELINES) $(1) || status=$$?; \
	$(PY) -m experiments.tables $$sweep && exit $$status
endef

run: .venv/ready
	$(call sweep,$(ONE))

digits: .venv/ready
	$(call sweep,$(ALL))

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PY) -m pytest -q

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check torch --constraint constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

clean:
	rm -rf .venv outputs
