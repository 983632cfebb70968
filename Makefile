# The commands of this repository; each makes the environment it needs.
#   make quickstart   the main job, from the shipped teacher to a report (about 9 minutes)
#   make test         all tests that need no GPU, but for those that take minutes
#   make test-slow    the long matrix of parallel layouts, and what else takes minutes (about 90 minutes)
#   make test-cluster on Debian, as root: launch scripts on a real Slurm over two hosts, the CPU image (27 minutes)
#   make certificates certify the quickstart's model anew, and the table of docs/layouts.md from it
#   make lint         formatter and linter, in a second; they run before the tests in CI
#   make checks       the same, types, and the pages of docs/ with their links
#   make bench-gpu    on a GPU machine: all benchmarks (22 minutes on an H100 without uneven plans)
#   make bench-2-gpus on a machine with two: the certificate, and training steps over both
#   make bench-8-gpus on a machine with eight: certificates, steps at every layout, the stages in a chain
#   make teacher      train the quickstart's teacher anew (a GPU helps)
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
# The newest transformers, which exported models must run in too; it shares PyTorch and all else.
NEWEST := $(VENV)/transformers-newest
# EleutherAI's harness, which shares PyTorch and all else too.
LM_EVAL := $(VENV)/lm-eval
# Weights & Biases and nvidia-resiliency-ext, which a training may use.
OPTIONAL := $(VENV)/optional

.PHONY: install quickstart test test-slow test-cluster test-gpu bench-gpu bench-2-gpus bench-8-gpus lint checks certificates teacher \
	clean

install: $(INSTALLED)

$(INSTALLED): requirements/cpu.txt requirements/dev.txt setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	# torch alone with what its build asks for: one with CUDA cannot be imported without it.
	$(VENV)/bin/pip install --quiet --constraint requirements/cpu.txt torch
	$(VENV)/bin/pip install --quiet --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# An environment beside the other, which shares what lies there; on top come the packages of $(1).
define beside
	test -x $(@D)/bin/python || $(VENV)/bin/python -m venv $(@D)
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(@D)/bin/pip install --quiet --no-deps -r $(1)
	touch $@
endef

$(NEWEST)/.installed: $(INSTALLED) requirements/transformers_newest.txt
	$(call beside,requirements/transformers_newest.txt)

$(LM_EVAL)/.installed: $(INSTALLED) requirements/lm_eval.txt
	$(call beside,requirements/lm_eval.txt)

$(OPTIONAL)/.installed: $(INSTALLED) requirements/optional.txt
	$(call beside,requirements/optional.txt)

quickstart: $(INSTALLED)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/quickstart/run.sh

# In the order of testpaths, which has the long files first: else one is left to the end. The test in
# the newest transformers runs beside it, which by itself would leave a core idle.
IN_NEWEST := $(NEWEST)/bin/python -m pytest -q -p no:cacheprovider $(patsubst %,tests/export/test_%.py,\
	decoding equal_to_megatron trained_in_transformers four_commands flash_attention calls)
test: $(INSTALLED) $(NEWEST)/.installed
	$(IN_NEWEST) -m "not gpu and not exhaustive" > $(NEWEST)/test.log 2>&1 & newest=$$!; \
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		-m "not gpu and not exhaustive"; code=$$?; \
	wait $$newest || code=1; cat $(NEWEST)/test.log; exit $$code

# As root on Debian; testpaths has no tests/cluster, which starts a Slurm over hosts that are namespaces.
test-cluster: $(INSTALLED)
	apt-get update -qq
	apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2 procps \
		buildah debootstrap
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m pytest -q --show-capture=no tests/cluster

test-slow: $(INSTALLED) $(NEWEST)/.installed $(OPTIONAL)/.installed $(LM_EVAL)/.installed
	$(VENV)/bin/python -m pytest -q -m "exhaustive and not gpu"; code=$$?; \
	$(IN_NEWEST) -m "exhaustive and not gpu" || code=1; exit $$code

CERTIFY := OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node
CERTIFIED := -m hydra_tools.certify --config examples/quickstart/certify.yaml --overwrite

certificates: $(INSTALLED)
	$(CERTIFY) 4 $(CERTIFIED) --tp 4 --cp 4 --pp 2 --length 64 --steps 2 \
		--out tests/certificates/cpu_4_ranks.json
	$(CERTIFY) 8 $(CERTIFIED) --tp 8 --cp 2 --pp 2 --layers 2 --length 32 --steps 2 --only parallel \
		--out tests/certificates/cpu_8_ranks.json
	$(VENV)/bin/python -m hydra_tools.certify --table tests/certificates/*.json --into docs/layouts.md

# On a GPU machine, in an environment that has Transformer Engine, fla and NeMo; -m "gpu and exhaustive"
# trains all of Qwen3-1.7B's shape, for which it writes 120 GB.
test-gpu:
	$(PYTHON) -m pytest -q -m "gpu and not exhaustive"

# On a GPU machine too: every table and picture of kernels/benchmarks/RESULTS.md, into BENCH_OUT.
BENCH_OUT ?= runs/benchmarks
STEP := tools/benchmarks/training_step.py
WHOLE := distill long_context full "full distill"
bench-gpu:
	mkdir -p $(BENCH_OUT)
	for name in tools/benchmarks/layer tools/benchmarks/training_step kernels/benchmarks/head_fusion \
			kernels/benchmarks/linear_kl kernels/benchmarks/la_preparation tools/benchmarks/decoding; do \
		$(PYTHON) $$name.py --out $(BENCH_OUT)/$$(basename $$name).json || exit; \
	done
	$(PYTHON) $(STEP) --cuda-graphs --lengths 4096 8192 --stages $(WHOLE) \
		--out $(BENCH_OUT)/cuda_graphs.json
	$(PYTHON) $(STEP) --fp8 --lengths 16384 --stages distill "full distill" --out $(BENCH_OUT)/fp8.json
	$(PYTHON) tools/benchmarks/layer.py --plans uneven \
		--lengths 4096 8192 16384 32768 65536 131072 --out $(BENCH_OUT)/layer_uneven.json
	$(PYTHON) $(STEP) --plan uniform uneven --lengths 4096 16384 --stages distill long_context \
		--out $(BENCH_OUT)/uneven.json
	$(PYTHON) tools/benchmarks/layer.py --draw $(BENCH_OUT)/layer.json --picture $(BENCH_OUT)/layer.png

TORCHRUN_2 := $(PYTHON) -m torch.distributed.run --nproc-per-node 2
bench-2-gpus:
	mkdir -p $(BENCH_OUT)
	$(TORCHRUN_2) -m hydra_tools.certify --config examples/qwen3_1p7b/certify.yaml --tp 2 --cp 2 \
		--layers 2 --length 256 --steps 2 model.vocab_size=8192 --out $(BENCH_OUT)/two_gpus.json
	$(TORCHRUN_2) $(STEP) --tp 2 --lengths 4096 16384 \
		--stages align $(WHOLE) --out $(BENCH_OUT)/tp_2.json
	$(TORCHRUN_2) $(STEP) --cp 2 --lengths 65536 131072 \
		--stages align $(WHOLE) --out $(BENCH_OUT)/cp_2.json
	$(TORCHRUN_2) $(STEP) --tp 2 --plan uniform uneven --lengths 16384 \
		--stages distill long_context --out $(BENCH_OUT)/tp_2_uneven.json

# On a GPU machine with eight, some 35 minutes (the same line goes on where it stopped): the certificates,
# steps at every layout, and the three stages after one another, killed once and gone on.
CERTIFY_8 := $(PYTHON) -m torch.distributed.run --nproc-per-node 8 -m hydra_tools.certify --overwrite \
	--config examples/qwen3_1p7b/certify.yaml --layers 4 --length 256 --steps 2 model.vocab_size=8192
bench-8-gpus:
	mkdir -p $(BENCH_OUT)
	$(CERTIFY_8) --tp 8 --cp 8 --pp 2 --out $(BENCH_OUT)/eight_gpus.json
	$(CERTIFY_8) --tp 8 --cp 8 --pp 2 --precision float32 --backend local --out $(BENCH_OUT)/eight_gpus_float32.json
	$(PYTHON) tools/benchmarks/layouts.py --gpus 8 --steps 5 --patience 480 --out $(BENCH_OUT)/layouts

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

checks: lint
	$(VENV)/bin/mypy
	$(VENV)/bin/mkdocs build --strict

teacher: $(INSTALLED)
	$(VENV)/bin/python examples/quickstart/make_teacher.py --out examples/quickstart/teacher --overwrite

clean:
	rm -rf runs build *.egg-info
