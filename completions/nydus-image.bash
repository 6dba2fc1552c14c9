# bash completion for nydus-image; made by scripts/reference: do not edit.
_nydus-image() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} path='' i word
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
            --backend-config|--backend-config-file|--backend-type|--batch-size|--blob|--blob-cache-dir|--blob-digests|--blob-dir|--blob-id|--blob-sizes|--blob-toc-digests|--blob-toc-sizes|--bootstrap|--cache|--chunk-dict|--chunk-size|--compact-blob-size|--compressor|--config|--database|--digester|--features|--fs-version|--layers-to-compact|--localfs-dir|--log-file|--log-level|--max-compact-size|--min-used-ratio|--original-blob-ids|--output|--output-blob-dir|--output-bootstrap|--output-json|--parent-bootstrap|--platform|--prefetch-files|--prefetch-policy|--processes|--request|--source-type|--target|--threads|--type|--whiteout-spec|-B|-C|-D|-J|-L|-O|-R|-T|-b|-l|-p|-t|-v) ((i++)); continue ;;
        esac
        case "$path/$word" in
            /create|/convert|/merge|/optimize|/compact|/chunkdict|/export|/check|/inspect|/stat|/unpack) path=$path/$word ;;
        esac
    done
    case "$path $prev" in
        " -l"|" --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        " -L"|" --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create -l"|"/create --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/create -L"|"/create --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create -t"|"/create --type"|"/create --source-type") COMPREPLY=($(compgen -W 'dir-rafs tar-rafs targz-rafs estargz-rafs targz-ref estargz-ref tar-tarfs directory estargztoc-ref stargz_index' -- "$cur")); return ;;
        "/create -B"|"/create --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create -D"|"/create --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/create -b"|"/create --blob") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create --blob-cache-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/create --blob-id") COMPREPLY=(); return ;;
        "/create --chunk-size") COMPREPLY=(); return ;;
        "/create --batch-size") COMPREPLY=(); return ;;
        "/create --compressor") COMPREPLY=($(compgen -W 'none lz4_block zstd' -- "$cur")); return ;;
        "/create --digester") COMPREPLY=($(compgen -W 'blake3 sha256' -- "$cur")); return ;;
        "/create -v"|"/create --fs-version") COMPREPLY=($(compgen -W '5 6' -- "$cur")); return ;;
        "/create --features") COMPREPLY=($(compgen -W 'blob-toc' -- "$cur")); return ;;
        "/create --chunk-dict") COMPREPLY=(); return ;;
        "/create --parent-bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/create --whiteout-spec") COMPREPLY=($(compgen -W 'oci overlayfs none' -- "$cur")); return ;;
        "/create --prefetch-policy") COMPREPLY=($(compgen -W 'none fs blob' -- "$cur")); return ;;
        "/create --processes") COMPREPLY=(); return ;;
        "/create -J"|"/create --output-json") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/convert -l"|"/convert --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/convert -L"|"/convert --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/convert -v"|"/convert --fs-version") COMPREPLY=($(compgen -W '5 6' -- "$cur")); return ;;
        "/convert --compressor") COMPREPLY=($(compgen -W 'none lz4_block zstd' -- "$cur")); return ;;
        "/convert --chunk-size") COMPREPLY=(); return ;;
        "/convert --platform") COMPREPLY=(); return ;;
        "/convert --cache") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/convert --processes") COMPREPLY=(); return ;;
        "/merge -l"|"/merge --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/merge -L"|"/merge --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/merge -B"|"/merge --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/merge -D"|"/merge --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/merge --parent-bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/merge --chunk-dict") COMPREPLY=(); return ;;
        "/merge --prefetch-policy") COMPREPLY=($(compgen -W 'none fs blob' -- "$cur")); return ;;
        "/merge --blob-digests") COMPREPLY=(); return ;;
        "/merge --original-blob-ids") COMPREPLY=(); return ;;
        "/merge --blob-sizes") COMPREPLY=(); return ;;
        "/merge --blob-toc-digests") COMPREPLY=(); return ;;
        "/merge --blob-toc-sizes") COMPREPLY=(); return ;;
        "/merge -J"|"/merge --output-json") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/optimize -l"|"/optimize --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/optimize -L"|"/optimize --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/optimize -B"|"/optimize --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/optimize -D"|"/optimize --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/optimize -C"|"/optimize --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/optimize -b"|"/optimize --blob") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/optimize --backend-type") COMPREPLY=(); return ;;
        "/optimize --backend-config") COMPREPLY=(); return ;;
        "/optimize --backend-config-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/optimize -p"|"/optimize --prefetch-files") COMPREPLY=(); return ;;
        "/optimize -O"|"/optimize --output-bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/optimize --output-blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/optimize -J"|"/optimize --output-json") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/compact -l"|"/compact --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/compact -L"|"/compact --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/compact -B"|"/compact --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/compact -D"|"/compact --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/compact --backend-type") COMPREPLY=(); return ;;
        "/compact --backend-config") COMPREPLY=(); return ;;
        "/compact --backend-config-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/compact --min-used-ratio") COMPREPLY=(); return ;;
        "/compact --compact-blob-size") COMPREPLY=(); return ;;
        "/compact --max-compact-size") COMPREPLY=(); return ;;
        "/compact --layers-to-compact") COMPREPLY=(); return ;;
        "/compact --chunk-dict") COMPREPLY=(); return ;;
        "/compact -O"|"/compact --output-bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/compact -J"|"/compact --output-json") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/chunkdict -l"|"/chunkdict --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/chunkdict -L"|"/chunkdict --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/chunkdict -B"|"/chunkdict --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/chunkdict -D"|"/chunkdict --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/chunkdict --database") COMPREPLY=(); return ;;
        "/chunkdict -J"|"/chunkdict --output-json") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/export -l"|"/export --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/export -L"|"/export --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/export -B"|"/export --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/export -D"|"/export --localfs-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/export -C"|"/export --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/export -O"|"/export --output") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/export --threads") COMPREPLY=(); return ;;
        "/check -l"|"/check --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/check -L"|"/check --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/check -B"|"/check --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/check -D"|"/check --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/check -C"|"/check --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/check -J"|"/check --output-json") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/inspect -l"|"/inspect --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/inspect -L"|"/inspect --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/inspect -B"|"/inspect --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/inspect -D"|"/inspect --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/inspect -C"|"/inspect --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/inspect -R"|"/inspect --request") COMPREPLY=(); return ;;
        "/stat -l"|"/stat --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/stat -L"|"/stat --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/stat -B"|"/stat --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/stat -D"|"/stat --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/stat -T"|"/stat --target") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/stat -J"|"/stat --output-json") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/unpack -l"|"/unpack --log-level") COMPREPLY=($(compgen -W 'trace debug info warn error' -- "$cur")); return ;;
        "/unpack -L"|"/unpack --log-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/unpack -B"|"/unpack --bootstrap") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/unpack -D"|"/unpack --blob-dir") compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        "/unpack -C"|"/unpack --config") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/unpack -b"|"/unpack --blob") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/unpack --backend-type") COMPREPLY=(); return ;;
        "/unpack --backend-config") COMPREPLY=(); return ;;
        "/unpack --backend-config-file") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
        "/unpack --output") compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    esac
    case "$path" in
        '') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -V --version create convert merge optimize compact chunkdict export check inspect stat unpack' -- "$cur")) ;;
        '/create') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -t --type --source-type -B --bootstrap -D --blob-dir -b --blob --blob-cache-dir --blob-inline-meta --inline-bootstrap --blob-id --chunk-size --batch-size --compressor --digester -v --fs-version --features -E --encrypt --aligned-chunk --chunk-dict --parent-bootstrap --repeatable --whiteout-spec --prefetch-policy --processes -J --output-json' -- "$cur")) ;;
        '/convert') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file --oci-ref -v --fs-version --compressor --chunk-size --platform --cache --plain-http --insecure --processes' -- "$cur")) ;;
        '/merge') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -B --bootstrap -D --blob-dir --parent-bootstrap --chunk-dict --prefetch-policy --blob-digests --original-blob-ids --blob-sizes --blob-toc-digests --blob-toc-sizes -J --output-json' -- "$cur")) ;;
        '/optimize') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -B --bootstrap -D --blob-dir -C --config -b --blob --backend-type --backend-config --backend-config-file -p --prefetch-files -O --output-bootstrap --output-blob-dir -J --output-json' -- "$cur")) ;;
        '/compact') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -B --bootstrap -D --blob-dir --backend-type --backend-config --backend-config-file --min-used-ratio --compact-blob-size --max-compact-size --layers-to-compact --chunk-dict -O --output-bootstrap -J --output-json' -- "$cur")) ;;
        '/chunkdict') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -B --bootstrap -D --blob-dir --database -J --output-json generate' -- "$cur")) ;;
        '/export') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file --block -B --bootstrap -D --localfs-dir -C --config -O --output --verity --threads' -- "$cur")) ;;
        '/check') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -B --bootstrap -D --blob-dir -C --config -v --verbose -J --output-json' -- "$cur")) ;;
        '/inspect') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -B --bootstrap -D --blob-dir -C --config -R --request' -- "$cur")) ;;
        '/stat') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -B --bootstrap -D --blob-dir -T --target -J --output-json' -- "$cur")) ;;
        '/unpack') COMPREPLY=($(compgen -W '-h --help -l --log-level -L --log-file -B --bootstrap -D --blob-dir -C --config -b --blob --backend-type --backend-config --backend-config-file --output' -- "$cur")) ;;
    esac
}
complete -F _nydus-image nydus-image
