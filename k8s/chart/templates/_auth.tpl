{{/*
Who may call whom, and with what: keys of servers, environment of clients, and the volumes of both.

Secrets are mounted as folders below /var/run/kleash, so that a changed Secret reaches the process,
which reads it again.
*/}}

{{- define "kleash.hasTls" -}}
{{- if or (eq .Values.auth.mode "mtls") .Values.auth.tls.enabled }}true{{ end -}}
{{- end -}}

{{- define "kleash.hasCertManager" -}}
{{- if and (include "kleash.hasTls" .) .Values.auth.tls.certManager.issuerRef.name }}true{{ end -}}
{{- end -}}

{{/* Protocol of a Service's port: h2c says that there is no TLS. Takes root, protocol. */}}
{{- define "kleash.appProtocol" -}}
{{- $hasTls := include "kleash.hasTls" .root -}}
{{- ternary "grpc" .protocol (and (eq $hasTls "true") (eq .protocol "kubernetes.io/h2c")) -}}
{{- end -}}

{{/* The same for the HTTP port. */}}
{{- define "kleash.httpProtocol" -}}
{{- ternary "https" "http" (eq (include "kleash.hasTls" .) "true") -}}
{{- end -}}

{{/* A name that every certificate of the release holds: replicas are called by their pods' addresses. */}}
{{- define "kleash.tlsServerName" -}}
{{- $shared := printf "%s.%s.svc" (include "kleash.fullname" .) .Release.Namespace -}}
{{- default (ternary $shared "" (eq (include "kleash.hasCertManager" .) "true")) .Values.auth.tls.serverName -}}
{{- end -}}

{{/* Secret with tls.crt, tls.key and ca.crt of a component. Takes root, component. */}}
{{- define "kleash.tlsSecret" -}}
{{- default (printf "%s-tls" (include "kleash.name" .)) .root.Values.auth.tls.existingSecret -}}
{{- end -}}

{{- define "kleash.audience" -}}
{{- default (include "kleash.fullname" .) .Values.auth.serviceAccount.audience -}}
{{- end -}}

{{/* Components that are clients of others. */}}
{{- define "kleash.isClient" -}}
{{- if or (has .component (list "trainer" "policy" "test")) (and (eq .component "packed") (has "policy" .root.Values.packed.services)) }}true{{ end -}}
{{- end -}}

{{- define "kleash.isServer" -}}
{{- if has .component (list "trainer" "policy" "reward" "reference" "packed") }}true{{ end -}}
{{- end -}}

{{/* Name of a component as a caller, in its certificate. Takes root, component. */}}
{{- define "kleash.certificateUri" -}}
{{- printf "spiffe://%s/ns/%s/sa/%s" .root.Values.clusterDomain .root.Release.Namespace (include "kleash.serviceAccount" .) -}}
{{- end -}}

{{/*
Names of the release's own pods as servers know them, as JSON. Takes root, callers: components.
*/}}
{{- define "kleash.ownCallers" -}}
{{- $auth := .root.Values.auth -}}
{{- $names := list -}}
{{- $components := include "kleash.components" .root | fromJsonArray -}}
{{- range $component := .callers -}}
{{- if has $component $components -}}
{{- $args := dict "root" $.root "component" $component -}}
{{- if eq $auth.mode "serviceAccount" -}}
{{- $names = append $names (printf "system:serviceaccount:%s:%s" $.root.Release.Namespace (include "kleash.serviceAccount" $args)) -}}
{{- else if eq $auth.mode "mtls" -}}
{{- $names = append $names (default (include "kleash.certificateUri" $args) (ternary $auth.tls.serverName "" (ne $auth.tls.existingSecret ""))) -}}
{{- else if eq $auth.mode "token" -}}
{{- $names = append $names $auth.token.callerName -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson (uniq $names) -}}
{{- end -}}

{{/* Components that call the services of a pod, as JSON. Takes root, component, keys: services. */}}
{{- define "kleash.callersOf" -}}
{{- $callers := list "trainer" "test" -}}
{{- if has "policy" .keys }}{{ $callers = append $callers .component }}{{ end -}}
{{- toJson $callers -}}
{{- end -}}

{{/*
Who may call a server, as JSON: the release's own pods and `allowedCallers`. Applications share the
reward service, so there everybody with a key or a certificate is let in unless it names callers.
The list is never empty otherwise: that would let in everybody whom the mode knows.
Takes root, component, callers, keys: of the values.
*/}}
{{- define "kleash.allowedCallers" -}}
{{- $extra := list -}}
{{- range .keys -}}
{{- $extra = concat $extra (index $.root.Values .).allowedCallers -}}
{{- end -}}
{{- $own := include "kleash.ownCallers" (dict "root" .root "callers" (append .callers .component)) | fromJsonArray -}}
{{- if and (has "reward" .keys) (not $extra) (ne .root.Values.auth.mode "serviceAccount") -}}
{{- $own = list -}}
{{- end -}}
{{- toJson (uniq (concat $own $extra)) -}}
{{- end -}}

{{/* Keys of a server's configuration, as JSON. Takes root, component, key, callers, keys. */}}
{{- define "kleash.serverSecurity" -}}
{{- $auth := .root.Values.auth -}}
{{- $config := dict -}}
{{- if include "kleash.hasTls" .root -}}
{{- $tls := dict "cert" "/var/run/kleash/tls/tls.crt" "key" "/var/run/kleash/tls/tls.key" -}}
{{- if eq $auth.mode "mtls" }}{{ $_ := set $tls "client_ca" "/var/run/kleash/tls/ca.crt" }}{{ end -}}
{{- $_ := set $config "tls" $tls -}}
{{- end -}}
{{- if ne $auth.mode "none" -}}
{{- $mode := dict "mode" (get (dict "serviceAccount" "service_account") $auth.mode | default $auth.mode) "allowed_callers" (include "kleash.allowedCallers" . | fromJsonArray) -}}
{{- if eq $auth.mode "token" }}{{ $_ := set $mode "tokens_file" "/var/run/kleash/tokens/tokens" }}{{ end -}}
{{- if eq $auth.mode "serviceAccount" }}{{ $_ := set $mode "audience" (include "kleash.audience" .root) }}{{ end -}}
{{- $_ := set $config "auth" $mode -}}
{{- end -}}
{{- $audit := (index .root.Values .key).audit -}}
{{- if ne $audit "auto" }}{{ $_ := set $config "audit" $audit }}{{ end -}}
{{- toJson $config -}}
{{- end -}}

{{/* Environment of clients, as JSON. Takes root, component. */}}
{{- define "kleash.clientEnv" -}}
{{- $env := dict -}}
{{- if include "kleash.isClient" . -}}
{{- if include "kleash.hasTls" .root -}}
{{- $_ := set $env "KLEASH_TLS_CA" "/var/run/kleash/tls/ca.crt" -}}
{{- with include "kleash.tlsServerName" .root }}{{ $_ := set $env "KLEASH_TLS_SERVER_NAME" . }}{{ end -}}
{{- if eq .root.Values.auth.mode "mtls" -}}
{{- $_ := set $env "KLEASH_TLS_CERT" "/var/run/kleash/tls/tls.crt" -}}
{{- $_ := set $env "KLEASH_TLS_KEY" "/var/run/kleash/tls/tls.key" -}}
{{- end -}}
{{- end -}}
{{- if has .root.Values.auth.mode (list "token" "serviceAccount") -}}
{{- $_ := set $env "KLEASH_TOKEN_FILE" "/var/run/kleash/token/token" -}}
{{- end -}}
{{- end -}}
{{- toJson $env -}}
{{- end -}}

{{/* {"volumes": [...], "mounts": [...]} as JSON. Takes root, component. */}}
{{- define "kleash.authVolumes" -}}
{{- $auth := .root.Values.auth -}}
{{- $volumes := list -}}
{{- $isClient := eq (include "kleash.isClient" .) "true" -}}
{{- $isServer := eq (include "kleash.isServer" .) "true" -}}
{{- if and (include "kleash.hasTls" .root) (or $isClient $isServer) -}}
{{- $volumes = append $volumes (dict "name" "tls" "secret" (dict "secretName" (include "kleash.tlsSecret" .))) -}}
{{- end -}}
{{- if and $isServer (eq $auth.mode "token") -}}
{{- $items := list (dict "key" $auth.token.tokensKey "path" "tokens") -}}
{{- $volumes = append $volumes (dict "name" "tokens" "secret" (dict "secretName" $auth.token.existingSecret "items" $items)) -}}
{{- end -}}
{{- if and $isClient (eq $auth.mode "token") -}}
{{- $items := list (dict "key" $auth.token.tokenKey "path" "token") -}}
{{- $volumes = append $volumes (dict "name" "token" "secret" (dict "secretName" $auth.token.existingSecret "items" $items)) -}}
{{- end -}}
{{- if and $isClient (eq $auth.mode "serviceAccount") -}}
{{- $source := dict "serviceAccountToken" (dict "path" "token" "audience" (include "kleash.audience" .root) "expirationSeconds" $auth.serviceAccount.expirationSeconds) -}}
{{- $volumes = append $volumes (dict "name" "token" "projected" (dict "sources" (list $source))) -}}
{{- end -}}
{{- $mounts := list -}}
{{- range $volumes -}}
{{- $mounts = append $mounts (dict "name" .name "mountPath" (printf "/var/run/kleash/%s" .name) "readOnly" true) -}}
{{- end -}}
{{- toJson (dict "volumes" $volumes "mounts" $mounts) -}}
{{- end -}}

{{/* Name of a component's ServiceAccount. Takes root, component. */}}
{{- define "kleash.serviceAccount" -}}
{{- $account := (index .root.Values (include "kleash.valuesKey" .component)).serviceAccount -}}
{{- if $account.create -}}
{{- default (include "kleash.name" .) $account.name -}}
{{- else -}}
{{- default "default" $account.name -}}
{{- end -}}
{{- end -}}

{{/* Whether a component's process talks to the API server. Takes root, component. */}}
{{- define "kleash.callsApi" -}}
{{- $reviewsTokens := and (eq .root.Values.auth.mode "serviceAccount") (include "kleash.isServer" .) -}}
{{- if or (eq .component "trainer") $reviewsTokens }}true{{ end -}}
{{- end -}}
