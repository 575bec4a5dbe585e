# Tools for this checkout, and one app per SKU; see docs/develop/nix.md. No image is built by Nix:
# the locks pin wheels by hash, and an image of them already is a function of this checkout.
{
  description = "Build, prove and release patched vLLM images for DeepSeek-V4 on Blackwell";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      system = "x86_64-linux"; # of the images, and so of what builds them
      pkgs = nixpkgs.legacyPackages.${system};

      # As noxfile.py names its sessions: by arch, or by SKU where several share an arch.
      skus = (builtins.fromTOML (builtins.readFile ./matrix.toml)).sku;
      ofArch = arch: builtins.filter (row: row.arch == arch) (builtins.attrValues skus);
      sessionOf =
        sku: arch:
        "build-"
        + (if builtins.length (ofArch arch) == 1 then builtins.replaceStrings [ "_" ] [ "" ] arch else sku);
      sessions = map (sku: sessionOf sku skus.${sku}.arch) (builtins.attrNames skus);

      # Not pkgs.nox, which is another program. nox starts virtualenv with its own Python.
      python = pkgs.python313.withPackages (packages: [ packages.nox packages.virtualenv ]);
      # Debian's name for it.
      registry = pkgs.writeShellScriptBin "docker-registry" ''
        exec ${pkgs.distribution}/bin/registry "$@"
      '';
      tools = [
        python
        pkgs.git
        # An image: `vllm-forge provision` installs the same from Debian.
        pkgs.apt
        pkgs.buildah
        pkgs.dpkg
        pkgs.mmdebstrap
        pkgs.runc
        pkgs.skopeo
        pkgs.squashfsTools
        pkgs.util-linux
        # Tests.
        pkgs.gcc
        pkgs.nodejs
        pkgs.openssl
        registry
      ];
      # Wheels from an index need the C++ library, which this Python does not find in /usr/lib.
      libraries = pkgs.lib.makeLibraryPath [ pkgs.stdenv.cc.cc.lib ];

      app = name: command: {
        type = "app";
        program = "${pkgs.writeShellScriptBin name ''
          if [ ! -f noxfile.py ] || [ ! -f matrix.toml ]; then
            echo "${name}: not a checkout of vllm-forge: $PWD" >&2
            echo "run: git clone, cd, then nix run .#${name}" >&2
            exit 2
          fi
          export PATH=${pkgs.lib.makeBinPath tools}:$PATH
          export LD_LIBRARY_PATH=${libraries}''${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
          exec ${python}/bin/nox ${command} -- "$@"
        ''}/bin/${name}";
      };
      builds = builtins.listToAttrs (
        map (name: { inherit name; value = app name "-s ${name}"; }) sessions
      );
    in
    {
      devShells.${system}.default = pkgs.mkShell {
        packages = tools;
        LD_LIBRARY_PATH = libraries;
      };

      # `nix run . -- COMMAND` reaches every command of vllm-forge.
      apps.${system} = builds // { default = app "forge" "-s forge"; };

      checks.${system} = {
        shell = self.devShells.${system}.default;
        style = pkgs.runCommand "style" { nativeBuildInputs = [ pkgs.codespell pkgs.ruff ]; } ''
          cd ${self}
          ruff check --no-cache .
          ruff format --no-cache --check .
          codespell
          touch $out
        '';
      };
    };
}
